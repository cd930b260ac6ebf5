"""What a folder that `evaluate` has filled says: figures, and their value for every prompt."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax import fingerprints
from dpr_jax.errors import UserError
from dpr_jax.evaluation.metrics import Column, Length, Repetition
from dpr_jax.paths import Path

# What every text has, whether or not it was measured when it was written.
OF_TEXTS = {"length": Length(), "repetition": Repetition()}
_REPAIR = "rerun the dpr_jax.evaluate command that wrote it"


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
  """One model, one benchmark, one way to answer."""

  path: Path
  system: str
  model: str
  benchmark: str
  settings: Mapping[str, Any]  # flag -> value; those of a judge as judge.NAME.
  versions: Mapping[str, str]  # of libraries, and of files that a user wrote.
  figures: Mapping[str, Mapping[str, Any]]  # name -> {mean, ci95, n}, as results.json has them.
  columns: Mapping[str, Column]  # of all figures and values.
  values: Mapping[str, np.ndarray]  # the mean over the samples of each prompt; NaN: no verdict.
  records: Sequence[Mapping[str, Any]]  # lines of responses.jsonl, with what a judge made of them.
  prompts: int
  samples: int
  has_texts: bool  # The model wrote the responses to prompts, rather than scored them.
  overlap: Mapping[str, Any]

  def called(self, system: str) -> "Evaluated":
    return dataclasses.replace(self, system=system)

  def first(self, index: int) -> Mapping[str, Any]:
    """The line of the first response to a prompt."""
    return self.records[index * self.samples]


def read_evaluation(path: Path, system: str) -> Evaluated:
  """The files of a folder.

  Args:
    system: what its model is called.

  Raises:
    UserError: the evaluation is not finished, or files were cut or edited; names the file.
  """
  results, config = _read_json(path / "results.json"), _read_json(path / "config.json")
  missing = {"benchmark", "n", "metrics", "columns", "settings"} - set(results)
  if missing:
    raise UserError(f"{path / 'results.json'}: has no {min(missing)!r}; {_REPAIR}")
  records = _read_lines(path / "responses.jsonl")
  settings, n = results["settings"], results["n"]
  samples, scored = settings.get("samples", 1), "scores" in (records or [{}])[0]
  # A harness has requests in place of prompts, and scores that are its own affair.
  if not records or (scored and len(records) != n * samples):
    raise UserError(f"{path / 'responses.jsonl'}: {len(records)} responses, and results.json is of "
                    f"{n * samples}; {_REPAIR}")
  has_texts = scored and "samples" in settings
  values = {k: [r["scores"][k] for r in records] for k in records[0]["scores"]} if scored else {}
  for name, found in values.items():
    _check_mean(path, name, found, results["metrics"].get(name))
  if (path / "judged.jsonl").exists():
    judged = [line["scores"] for line in _read_lines(path / "judged.jsonl", sealed=False)]
    if len(judged) != len(records):
      raise UserError(f"{path / 'judged.jsonl'}: {len(judged)} lines of {len(records)}; {_REPAIR}")
    values |= {k: [scores[k] for scores in judged] for k in judged[0]}
    records = [{**r, "scores": {**r["scores"], **j}} for r, j in zip(records, judged, strict=True)]
  columns = {name: Column(**c) for name, c in results["columns"].items()}
  for name, metric in OF_TEXTS.items() if has_texts else ():
    values.setdefault(name, [metric.score(record) for record in records])
    columns.setdefault(name, metric.column())
  judge, contents = results.get("judge") or {}, config.get("contents", {})
  return Evaluated(
      path, system, str(results.get("model", "")), str(results["benchmark"]),
      {**settings, **{f"judge.{name}": value for name, value in judge.items()}},
      {**results.get("versions", {}), **contents.get("benchmark", {}),
       **contents.get("metrics", {})},
      results["metrics"], columns, {k: _over_samples(v, samples) for k, v in values.items()},
      records, n, samples, has_texts, results.get("overlap") or {},
  )


def _over_samples(values: Sequence[float | None], samples: int) -> np.ndarray:
  """The mean of what is known of each prompt, [P]; NaN where nothing is."""
  table = np.array([math.nan if x is None else x for x in values], np.float64)
  table = table.reshape(-1, samples)
  known = np.isfinite(table)
  count = known.sum(axis=1)
  total = np.where(known, table, 0.0).sum(axis=1)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _check_mean(path: Path, name: str, values: Sequence[float], figure: Any) -> None:
  """Raises UserError where results.json is of other responses."""
  mean = float(np.mean(values))
  if figure and not math.isclose(figure["mean"], mean, rel_tol=1e-6, abs_tol=1e-9):
    raise UserError(f"{path / 'results.json'}: {name} is {figure['mean']:.6g}, and {mean:.6g} in "
                    f"responses.jsonl; {_REPAIR}")


def _read_json(path: Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path}: no such file, so the evaluation is not finished; {_REPAIR}") from None
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise UserError(f"{path}: cut, or no JSON object; {_REPAIR}")
  return found


def _read_lines(path: Path, sealed: bool = True) -> list[dict[str, Any]]:
  found = []
  for number, line in enumerate(path.read_bytes().splitlines(), start=1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      record = None
    if not (fingerprints.is_whole(record) if sealed else isinstance(record, dict)):
      raise UserError(f"{path}:{number}: cut or edited; {_REPAIR}")
    found.append(record)
  return found
