"""Folders that `evaluate` has filled -> columns: what may be compared, and with which words.

A column is a benchmark; where one system was evaluated on it in several ways, such as several
temperatures, each of these is a column of its own. Several folders of one system in a column are
its runs, training seeds as a rule, in the order of their paths. All folders of a column must have
the same prompts, because differences are paired prompt by prompt.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.evaluation.evaluated import OF_TEXTS, Evaluated

# Settings that leave the question and the way to answer it as they are.
_NEUTRAL = ("data", "metrics", "batch_size", "max_prompts", "seed")
_JUDGED_BY = ("judge.kind", "judge.model", "judge.prompts")


@dataclasses.dataclass(frozen=True)
class Benchmarked:
  """A column: the folders whose figures may be compared."""

  label: str
  runs: Mapping[str, Sequence[Evaluated]]  # system -> its runs.

  @property
  def all(self) -> list[Evaluated]:
    return list(itertools.chain(*self.runs.values()))

  @property
  def columns(self) -> dict[str, Any]:
    """Name -> `Column` of whatever was measured of any system."""
    out: dict[str, Any] = {}
    for folder in self.all:
      out = {**folder.columns, **out}
    return out

  def main(self, known: Sequence[str]) -> str:
    """The figure that says most, of those known: a main one with a direction if there is one."""
    rank = lambda name: (not self.columns[name].better, not self.columns[name].main)
    names = [name for name in self.columns if name in known]
    return min(names, key=rank, default="")

  @property
  def figure(self) -> str:
    return self.main([n for f in self.all for n in f.figures])

  @property
  def score(self) -> str:
    """The figure that says most of each prompt; "" without any."""
    name = self.main([n for f in self.all for n in f.values if n not in OF_TEXTS])
    return name if name and self.columns[name].better else ""

  @property
  def has_texts(self) -> bool:
    """Whether models wrote some."""
    return all(folder.has_texts for folder in self.all)

  def id(self, name: str) -> str:
    return f"{self.label}: {name}"

  def pair(self, a: str, b: str, name: str) -> list[list[np.ndarray]] | None:
    """Values of two systems in each run, over the prompts that both have one for.

    None where one of them has no values, or another number of runs.
    """
    sides = [[r.values[name] for r in self.runs.get(s, ()) if name in r.values] for s in (a, b)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
      return None
    known = [np.isfinite(x) & np.isfinite(y) for x, y in zip(*sides, strict=True)]
    if not all(k.any() for k in known):
      return None
    return [[v[k] for v, k in zip(side, known, strict=True)] for side in sides]


def group_folders(folders: Sequence[Evaluated]) -> list[tuple[str, list[Evaluated]]]:
  """(label, folders) of each benchmark with its fields."""
  of: dict[str, list[Evaluated]] = {}
  for folder in folders:
    own = {k: v for k, v in folder.settings.items() if k.partition(".")[0] == "benchmark"}
    of.setdefault(json.dumps(own, sort_keys=True), []).append(folder)
  kinds = Counter(group[0].benchmark for group in of.values())
  groups, taken, written = [], Counter(), written_by(folders)
  for group in of.values():
    kind = group[0].benchmark
    label = kind.rpartition("/")[2]
    fields = [name for name in group[0].settings if name.startswith("benchmark.")]
    others = [g[0].settings for g in of.values() if g[0].benchmark == kind]
    parts = [
        f"{name.partition('.')[2]} {shown}" for name in fields
        if kinds[kind] > 1 and len({str(s.get(name)) for s in others}) > 1
        and (shown := shown_value(group[0].settings[name], written))
    ]
    label = f"{label} ({', '.join(parts)})" if parts else label
    taken[label] += 1
    groups.append((label if taken[label] == 1 else f"{label} #{taken[label]}", group))
  return groups


def written_by(folders: Sequence[Evaluated]) -> dict[str, str]:
  """Path of a responses.jsonl -> its system."""
  return {str(folder.path / "responses.jsonl"): folder.system for folder in folders}


def shown_value(value: Any, written: Mapping[str, str]) -> str:
  """The value of a setting; of a path its last part, or the system that wrote it."""
  if isinstance(value, list):
    return ", ".join(map(str, value)).replace("/", "-")
  path = pathlib.PurePath(str(value))
  if path.name != "responses.jsonl":
    return path.name
  return written.get(str(pathlib.Path(path).absolute()), path.parent.name)


def ways(folder: Evaluated) -> dict[str, Any]:
  """The settings that may differ within a benchmark."""
  own = folder.settings.items()
  return {k: v for k, v in own if k.partition(".")[0] != "benchmark" and k not in _NEUTRAL}


def split_columns(label: str, folders: Sequence[Evaluated]) -> list[Benchmarked]:
  """A column for each of the ways in which a system was evaluated."""
  of_system: dict[str, list[Evaluated]] = {}
  for folder in folders:
    of_system.setdefault(folder.system, []).append(folder)
  names = sorted({k for f in folders for k in ways(f)}, key=lambda name: name != "temperature")
  key = lambda f, names: tuple(str(f.settings.get(name)) for name in names)
  used: list[str] = []
  for name in names:
    distinct = [{key(f, (*used, name)) for f in of} for of in of_system.values()]
    before = [{key(f, used) for f in of} for of in of_system.values()]
    if any(len(d) > len(b) for d, b in zip(distinct, before, strict=True)):
      used.append(name)
  out: dict[str, dict[str, list[Evaluated]]] = {}
  for folder in folders:
    way = ", ".join([label, *(_way(name, folder.settings.get(name)) for name in used)])
    out.setdefault(way, {}).setdefault(folder.system, []).append(folder)
  return [
      Benchmarked(way, {s: sorted(of, key=lambda f: str(f.path)) for s, of in runs.items()})
      for way, runs in out.items()
  ]


def _way(name: str, value: Any) -> str:
  if name == "temperature":
    return f"temperature {value:g}" if value else "greedy"
  return f"{name.replace('_', ' ')} {shown_value(value, {})}"


def asked(folder: Evaluated) -> list[tuple[Any, Any]]:
  """(prompt, answer) of each prompt."""
  return [(r.get("prompt"), r.get("answer")) for r in folder.records[:: folder.samples]]


def check_column(column: Benchmarked) -> None:
  """Raises UserError for folders that are not of the same prompts and judge, or twice the same."""
  first, *rest = column.all
  expected = asked(first)
  for folder in rest:
    found = asked(folder)  # `Evaluated.prompts` counts only those that were scored.
    if len(found) != len(expected):
      raise UserError(f"{folder.path}: {len(found)} prompts, and {first.path} has "
                      f"{len(expected)}; evaluate both with the same --data and --max_prompts")
    for i, (a, b) in enumerate(zip(found, expected)):
      if a != b:
        raise UserError(f"{folder.path}: prompt {i + 1}, {str(a[0])[:60]!r}, or its answer is not "
                        f"that of {first.path}; evaluate both with the same --data")
    for name in _JUDGED_BY:
      a, b = (f.settings.get(name) for f in (folder, first))
      if a != b:
        raise UserError(f"{folder.path}: judged with another {name.partition('.')[2]} "
                        f"({str(a)[:60]!r}) than {first.path} ({str(b)[:60]!r}); judge both alike")
  for runs in column.runs.values():
    for a, b in itertools.combinations(runs, 2):
      if [r["response"] for r in a.records if "response" in r] == [
          r["response"] for r in b.records if "response" in r] and a.has_texts:
        raise UserError(f"{a.path} and {b.path}: the same responses of {a.system}; name one")


def describe_column(column: Benchmarked) -> dict[str, Any]:
  return {
      "label": column.label, "metric": column.id(column.figure), "prompts": column.all[0].prompts,
      "texts": column.has_texts,
      "folders": {s: [str(r.path) for r in runs] for s, runs in column.runs.items()},
  }


def column_notes(column: Benchmarked) -> list[str]:
  """Whatever a reader should know before comparing the figures of a column."""
  out, folders = [], column.all
  for name in dict.fromkeys(k for f in folders for k in ways(f)):
    out += _differing(column, name.replace("_", " "), lambda f, name=name: f.settings.get(name))
  for name in dict.fromkeys(k for f in folders for k in f.versions):
    words = f"version of {pathlib.PurePath(name).name}"
    out += _differing(column, words, lambda f, name=name: f.versions.get(name))
  out += _differing(column, "the number of prompts that were scored", lambda f: f.prompts)
  counts = {s: len(runs) for s, runs in column.runs.items()}
  if len(set(counts.values())) > 1:
    said = ", ".join(f"{s}: {n}" for s, n in counts.items())
    out.append(f"{column.label}: runs of {said}; systems with other numbers of runs are not "
               "compared.")
  elif max(counts.values()) > 1:
    out.append(f"{column.label}: {max(counts.values())} runs of each system, whose spread is in "
               "the intervals; paired in the order of their folders.")
  if not column.score and len(column.runs) > 1:
    out.append(f"{column.label}: its files have no scores per prompt, so there are no paired "
               "differences.")
  elif column.score and column.score != column.figure:
    out.append(f"{column.label}: win rates by prompt are of {column.columns[column.score].label}.")
  for folder in (f for f in folders if column.score in {*f.figures} & {*f.values}):
    mean, figure = np.nanmean(folder.values[column.score]), folder.figures[column.score]["mean"]
    if not math.isclose(mean, figure, rel_tol=1e-6, abs_tol=1e-9):
      out.append(f"{column.label}: {column.columns[column.score].label} does not weigh all prompts "
                 "alike; paired differences do.")
  for folder in folders:
    if folder.overlap.get("count"):
      out.append(f"{column.label}: {folder.overlap['count']} of its {folder.prompts} prompts are "
                 f"among the demonstrations that {folder.system} was trained on.")
  return list(dict.fromkeys(out))


def _differing(column: Benchmarked, what: str, of: Any) -> list[str]:
  found: dict[str, list[str]] = {}
  for system, runs in column.runs.items():
    for run in runs:
      value = of(run)
      found.setdefault("none" if value in (None, "", []) else str(value)[:80], []).append(system)
  if len(found) == 1:
    return []
  said = "; ".join(f"{value} for {', '.join(dict.fromkeys(s))}" for value, s in found.items())
  return [f"{column.label}: systems differ in {what}: {said}."]
