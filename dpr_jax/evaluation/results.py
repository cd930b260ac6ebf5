"""samples/ of one or several seeds -> results.json: means, intervals, comparisons.

A pure function of files, so that a report can be made again at any time. Which systems and columns
there are, and what is compared, is read from config.json and samples/measures.json.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation import cleaning, corruption, frontier
from dpr_jax.evaluation.expert import equal_length_logp
from dpr_jax.evaluation.metrics import Column
from dpr_jax.evaluation.statistics import compare, interval
from dpr_jax.evaluation.systems import MODES
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.stopping import FILE as STOPPED_FILE
from dpr_jax.training.stopping import read_stopped
from dpr_jax.workdir import Workdir, read_lines

ALWAYS = ("base", "ref", "sft")  # systems of every run, in the order of tables.


def pairs(compared: Sequence[str], subjects: Sequence[str]) -> list[tuple[str, str]]:
  """What is compared: sft with ref, every system with sft, every subject with every system.

  Args:
    compared: names of config.compare.
    subjects: those of them that learn from the reward, and the last.
  """
  out = [("sft", "ref"), *((name, "sft") for name in compared)]
  for subject in sorted(subjects, key=compared.index, reverse=True):
    out += [
        (subject, name) for name in compared
        if name != subject and (name, subject) not in out
    ]
  return out


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class _Seed:
  """The values of one seed: system -> column -> one value per prompt."""

  def __init__(self, workdir: Workdir, names: Sequence[str]):
    measures = _read_json(workdir.measures_file)
    self.columns = {n: Column(**c) for n, c in measures.get("columns", {}).items()}
    self.shown: dict[str, Column] = {}  # of what is found here, modes and groups included.
    self.values = {}
    for name in names:
      path = workdir.system_file(name)
      if path.exists():
        own = measures.get("values", {}).get(name, {})
        self.values[name] = {**self._of_records(read_lines(path)), **own}
        self.shown |= {c: self.columns[c] for c in own}

  def _of_records(self, records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    out = {}
    for mode in MODES:
      rows = [r for r in records if r["mode"] == mode]
      for score in rows[0]["scores"] if rows else ():
        name, column = f"{score}_{mode}", self.columns[score].of_mode(mode)
        out[name], self.shown[name] = [r["scores"][score] for r in rows], column
      groups = sorted({g for r in rows for g in r["groups"]})
      for group in groups if len(groups) > 1 else ():
        name = f"accuracy_{mode}/{group}"
        out[name] = [float(r["correct"]) for r in rows if group in r["groups"]]
        column = self.columns["accuracy"].of_mode(mode)
        self.shown[name] = column.of_group(group, main=mode == "sampled")
    return out


def _arrays(seeds: Sequence[_Seed], a: str, b: str, name: str, column: Column) -> list[np.ndarray]:
  """Values of system a, for each seed; of lists per token, over as many as b has."""
  out = []
  for seed in seeds:
    values = seed.values[a][name]
    if column.per_token:
      other = seed.values.get(b, seed.values[a]).get(name, values)
      values = equal_length_logp(values, other)
    out.append(np.asarray(values, np.float64))
  return out


def build_results(workdirs: Sequence[pathlib.Path], seeds: Sequence[int]) -> dict[str, Any]:
  """results.json of runs that differ in their seed only.

  Returns:
    seeds; systems: name -> column -> {mean, ci95, n}; labels of the systems; columns: what each
    is; comparisons: pair, metric, difference, ci95, p (paired over prompts); frontier: see
    `evaluation.frontier.summarize`; stages: steps, seconds, tokens and budget of each, of the first
    seed; notes: sentences for the reader; corruption: see `evaluation.corruption.summarize`;
    corruption_titles: of its kinds and rewards; cleaning: method -> `cleaning.summarize`. What no
    seed has is absent.
  """
  dirs = [Workdir(w) for w in workdirs]
  described = dirs[0].read_config()["described"]
  compared = list(described["labels"])
  found = [_Seed(w, (*ALWAYS, *compared)) for w in dirs]
  everywhere = lambda name: all(name in s.values for s in found)
  names = [n for n in (*ALWAYS, *compared) if everywhere(n)]
  columns = {}
  for seed in found:
    columns |= seed.shown
  has = lambda name, column: all(column in s.values[name] for s in found)
  systems = {
      name: {
          c: interval(_arrays(found, name, "sft", c, column))
          for c, column in columns.items() if has(name, c)
      }
      for name in names
  }
  comparisons = []
  for a, b in pairs(compared, described["subjects"]):
    if a not in systems or b not in systems:
      continue
    for name, column in columns.items():
      if column.compared and has(a, name) and has(b, name):
        sides = (_arrays(found, x, y, name, column) for x, y in ((a, b), (b, a)))
        comparisons.append({"pair": [a, b], "metric": name, **compare(*sides)})
  results = {
      "seeds": list(seeds),
      "systems": systems,
      "labels": {**described["always"], **described["labels"]},
      "main": (compared or ["sft"])[-1],
      "columns": {n: vars(c) for n, c in columns.items() if any(n in s for s in systems.values())},
      "comparisons": comparisons,
      "stages": _stages(dirs[0], described),
      "notes": _notes(dirs, seeds),
  }
  curves = frontier.summarize([w.frontier for w in dirs], names)
  if curves:
    results["frontier"] = curves
  if all(w.corruption_file.exists() for w in dirs):
    lines = [read_lines(w.corruption_file) for w in dirs]
    results |= {"corruption": corruption.summarize(lines), "corruption_titles": corruption.titles()}
  judged = {name: [w.stage(name) / cleaning.FILE for w in dirs] for name in names}
  found = {name: files for name, files in judged.items() if all(f.exists() for f in files)}
  if found:
    results["cleaning"] = {
        name: cleaning.summarize([read_lines(f) for f in files]) for name, files in found.items()
    }
  return results


def build_sweep_results(
    workdirs: Sequence[pathlib.Path], seeds: Sequence[int], field: str, folders: Mapping[str, str]
) -> dict[str, Any]:
  """results.json of a sweep whose seeds are in `workdirs`.

  Args:
    field: the dotted field that is swept over.
    folders: value -> name of the point's folder in each of `workdirs`.

  Returns:
    What `build_results` returns, of the systems that all points share (none, perhaps); and sweep:
    field, values, points: value, folder, systems, comparisons and corruption of each.
  """
  results = build_results(workdirs, seeds)
  found = []
  for value, folder in folders.items():
    whole = build_results([w / folder for w in workdirs], seeds)
    results["columns"] = {**whole["columns"], **results["columns"]}
    kept = {k: whole[k] for k in ("systems", "comparisons", "corruption", "frontier") if k in whole}
    found.append({"value": value, "folder": folder, **kept})
  results["sweep"] = {"field": field, "values": list(folders), "points": found}
  return results


def _notes(workdirs: Sequence[Workdir], seeds: Sequence[int]) -> list[str]:
  """Stages that ended before their last step."""
  out = []
  for workdir, seed in zip(workdirs, seeds, strict=True):
    for path in sorted(workdir.path.glob(f"*/{STOPPED_FILE}")):
      found = read_stopped(path.parent)
      of = f" of seed {seed}" if len(seeds) > 1 else ""
      out.append(
          f"Stage {path.parent.name}{of} ended after step {found['step']} of {found['steps']}: "
          f"{found['reason']}. That step is its result; other methods made all their steps."
      )
  return out


def _stages(workdir: Workdir, described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  out = {}
  for path in sorted(workdir.path.glob("*/metrics.jsonl")):
    lines, name = read_metrics(path), path.parent.name
    if lines:
      out[name] = {key: lines[-1][key] for key in ("step", "seconds", "tokens")}
      out[name] = {"steps": out[name].pop("step"), **out[name]}
      if name in described["own_budget"]:
        out[name]["own_budget"] = described["own_budget"][name]
  return out
