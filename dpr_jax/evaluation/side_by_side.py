"""Folders that `evaluate` has filled -> systems side by side: a pure function of their files.

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
from dpr_jax.evaluation import frontier
from dpr_jax.evaluation.evaluated import OF_TEXTS, Evaluated
from dpr_jax.evaluation.statistics import compare, interval

# Settings that leave the question and the way to answer it as they are.
_NEUTRAL = ("data", "metrics", "batch_size", "max_prompts", "seed")
_JUDGED_BY = ("judge.kind", "judge.model", "judge.prompts")
_EXAMPLES = 12  # prompts whose responses are shown, shared out among the benchmarks.


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


def side_by_side(folders: Sequence[Evaluated]) -> dict[str, Any]:
  """Figures, differences and win shares of systems, the first of which is the baseline.

  Returns:
    systems, columns and comparisons as in the results.json of a run, whose metrics are called
    COLUMN: NAME here; labels; baseline; main (the last system); benchmarks: label, metric (the id
    of its main one), prompts, texts (whether models wrote some) and folders of each column; wins:
    of each column with scores per prompt benchmark, metric and cells: system -> other -> {mean,
    ci95, n, wins, ties, losses};
    judged: of each judged benchmark name, references, cells: system -> reference -> figure;
    frontiers: benchmark -> `frontier.compare_curves`; examples: benchmark, metric and index of
    prompts, the largest disagreement first; notes: sentences for the reader.

  Raises:
    UserError: folders that cannot be compared; names two of them.
  """
  systems = list(dict.fromkeys(folder.system for folder in folders))
  groups = _groups(folders)
  columns = [column for group in groups for column in _split(*group)]
  for column in columns:
    _check(column)
  out: dict[str, Any] = {
      "systems": {name: {} for name in systems}, "labels": {name: name for name in systems},
      "baseline": systems[0], "main": systems[-1], "columns": {}, "comparisons": [],
      "benchmarks": [_described(column) for column in columns],
  }
  for column in columns:
    for name, about in column.columns.items():
      found = {s: figure for s in systems if (figure := _figure(column.runs.get(s, ()), name))}
      for system, figure in found.items():
        out["systems"][system][column.id(name)] = figure
      out["columns"][column.id(name)] = vars(dataclasses.replace(
          about, label=f"{column.label}: {about.label}", main=name == column.figure))
      for b, a in itertools.combinations(systems, 2) if about.compared else ():
        if sides := column.pair(a, b, name):
          out["comparisons"].append({"pair": [a, b], "metric": column.id(name), **compare(*sides),
                                     "n": sum(map(len, sides[0]))})
  out["wins"] = [w for column in columns if (w := _wins(column, systems))]
  out["judged"] = _judged(columns)
  frontiers = {label: _frontier(label, of, systems[0]) for label, of in groups}
  out["frontiers"] = {label: curves for label, (curves, _) in frontiers.items() if curves}
  shown = [c for c in (_widest(columns, of) for _, of in groups) if c.score and _texts(c)]
  out["examples"] = [e for c in shown for e in _examples(c, max(2, _EXAMPLES // len(shown)))]
  out["notes"] = [note for column in columns for note in _notes(column)]
  out["notes"] += [note for _, notes in frontiers.values() for note in notes]
  return out


# --- Columns --------------------------------------------------------------------------------------


def _groups(folders: Sequence[Evaluated]) -> list[tuple[str, list[Evaluated]]]:
  """(label, folders) of each benchmark with its fields."""
  of: dict[str, list[Evaluated]] = {}
  for folder in folders:
    own = {k: v for k, v in folder.settings.items() if k.partition(".")[0] == "benchmark"}
    of.setdefault(json.dumps(own, sort_keys=True), []).append(folder)
  kinds = Counter(group[0].benchmark for group in of.values())
  groups, taken, written = [], Counter(), _written(folders)
  for group in of.values():
    kind = group[0].benchmark
    label = kind.rpartition("/")[2]
    fields = [name for name in group[0].settings if name.startswith("benchmark.")]
    others = [g[0].settings for g in of.values() if g[0].benchmark == kind]
    parts = [
        f"{name.partition('.')[2]} {shown}" for name in fields
        if kinds[kind] > 1 and len({str(s.get(name)) for s in others}) > 1
        and (shown := _shown(group[0].settings[name], written))
    ]
    label = f"{label} ({', '.join(parts)})" if parts else label
    taken[label] += 1
    groups.append((label if taken[label] == 1 else f"{label} #{taken[label]}", group))
  return groups


def _written(folders: Sequence[Evaluated]) -> dict[str, str]:
  """Path of a responses.jsonl -> its system."""
  return {str(folder.path / "responses.jsonl"): folder.system for folder in folders}


def _shown(value: Any, written: Mapping[str, str]) -> str:
  """The value of a setting; of a path its last part, or the system that wrote it."""
  if isinstance(value, list):
    return ", ".join(map(str, value)).replace("/", "-")
  path = pathlib.PurePath(str(value))
  if path.name != "responses.jsonl":
    return path.name
  return written.get(str(pathlib.Path(path).absolute()), path.parent.name)


def _ways(folder: Evaluated) -> dict[str, Any]:
  """The settings that may differ within a benchmark."""
  own = folder.settings.items()
  return {k: v for k, v in own if k.partition(".")[0] != "benchmark" and k not in _NEUTRAL}


def _split(label: str, folders: Sequence[Evaluated]) -> list[Benchmarked]:
  """A column for each of the ways in which a system was evaluated."""
  of_system: dict[str, list[Evaluated]] = {}
  for folder in folders:
    of_system.setdefault(folder.system, []).append(folder)
  names = sorted({k for f in folders for k in _ways(f)}, key=lambda name: name != "temperature")
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
  return f"{name.replace('_', ' ')} {_shown(value, {})}"


def _asked(folder: Evaluated) -> list[tuple[Any, Any]]:
  """(prompt, answer) of each prompt."""
  return [(r.get("prompt"), r.get("answer")) for r in folder.records[:: folder.samples]]


def _check(column: Benchmarked) -> None:
  """Raises UserError for folders that are not of the same prompts and judge, or twice the same."""
  first, *rest = column.all
  expected = _asked(first)
  for folder in rest:
    found = _asked(folder)  # `Evaluated.prompts` counts only those that were scored.
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


def _described(column: Benchmarked) -> dict[str, Any]:
  return {
      "label": column.label, "metric": column.id(column.figure), "prompts": column.all[0].prompts,
      "texts": _texts(column),
      "folders": {s: [str(r.path) for r in runs] for s, runs in column.runs.items()},
  }


def _notes(column: Benchmarked) -> list[str]:
  """Whatever a reader should know before comparing the figures of a column."""
  out, folders = [], column.all
  for name in dict.fromkeys(k for f in folders for k in _ways(f)):
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


# --- Figures --------------------------------------------------------------------------------------


def _figure(runs: Sequence[Evaluated], name: str) -> dict[str, Any] | None:
  """{mean, ci95, n}: of one run as results.json has it, else over the values of all."""
  if len(runs) == 1 and name in runs[0].figures:
    return dict(runs[0].figures[name])
  values = [r.values[name][np.isfinite(r.values[name])] for r in runs if name in r.values]
  return interval(values) if len(values) == len(runs) and values and all(map(len, values)) else None


def _wins(column: Benchmarked, systems: Sequence[str]) -> dict[str, Any] | None:
  """How often the score of a system is the better one; half of a tie counts."""
  name, cells = column.score, {}
  for a, b in itertools.permutations(systems, 2) if name else ():
    if sides := column.pair(a, b, name):
      better = column.columns[name].better
      signs = [np.sign(better * (x - y)) for x, y in zip(*sides, strict=True)]
      count = lambda sign, signs=signs: int(sum(np.sum(s == sign) for s in signs))
      cells.setdefault(a, {})[b] = {
          **interval([(s + 1) / 2 for s in signs]),
          "wins": count(1), "ties": count(0), "losses": count(-1),
      }
  return {"benchmark": column.label, "metric": column.id(name), "cells": cells} if cells else None


def _judged(columns: Sequence[Benchmarked]) -> list[dict[str, Any]]:
  """Win rates against references, a table for each judged benchmark."""
  tables: dict[str, dict[str, Any]] = {}
  written = _written([folder for column in columns for folder in column.all])
  for column in columns:
    first = column.all[0]
    if "benchmark.reference" not in first.settings or column.figure != "win_rate":
      continue
    reference = _shown(first.settings["benchmark.reference"], written) or "the data's own"
    table = tables.setdefault(first.benchmark, {"name": first.benchmark, "references": [],
                                                "cells": {}})
    if reference in table["references"]:
      reference = column.label
    table["references"].append(reference)
    for system, runs in column.runs.items():
      if figure := _figure(runs, "win_rate"):
        table["cells"].setdefault(system, {})[reference] = figure
  return list(tables.values())


# --- Frontier -------------------------------------------------------------------------------------


def _frontier(
    label: str, folders: Sequence[Evaluated], baseline: str
) -> tuple[dict[str, Any], list[str]]:
  """(curves over the temperatures that systems have in common, what was left out of them).

  There are none without two such temperatures, or where prompts differ, which are paired.
  """
  scored = [f for f in folders if f.has_texts and "accuracy" in f.values
            and all(r["scores"]["accuracy"] in (0, 1) for r in f.records)]
  way = lambda f: str({k: v for k, v in _ways(f).items() if k not in ("temperature", "samples")})
  sampled = [f for f in scored if f.samples > 1 and f.settings["temperature"]]
  kinds = Counter((f.samples, way(f)) for f in sampled)
  if not kinds:
    return {}, []
  samples, same = max(kinds, key=kinds.get)
  alike = [f for f in scored if way(f) == same
           and (not f.settings["temperature"] or f.samples == samples)]
  of: dict[str, dict[float, list[Evaluated]]] = {}
  for folder in sorted(alike, key=lambda f: str(f.path)):
    of.setdefault(folder.system, {}).setdefault(folder.settings["temperature"], []).append(folder)
  of = {s: of[s] for f in folders if len(set(of.get(s := f.system, ())) - {0}) > 1}
  if not of:
    return {}, []
  common = set.intersection(*map(set, of.values()))
  if len(common - {0}) < 2:
    return {}, [f"{label}: no frontier, because systems do not have two temperatures in common."]
  runs = min(len(found[t]) for found in of.values() for t in common)
  kept = [f for found in of.values() for t in common for f in found[t][:runs]]
  if any(_asked(f) != _asked(kept[0]) for f in kept):
    return {}, [f"{label}: no frontier, because temperatures are of different prompts; evaluate "
                "all with the same --data and --max_prompts."]
  counts = {
      system: [
          frontier.Counts.of(r for t in common for r in _counted(found[t][run]))
          for run in range(runs)
      ]
      for system, found in of.items()
  }

  def reason(folder):
    temperature = folder.settings["temperature"]
    if folder not in alike:
      return f"evaluated in another way than most, which have {samples} samples"
    if folder.system not in of:
      return f"{folder.system} has no two temperatures"
    if temperature not in common:
      return f"not all systems have temperature {temperature:g}"
    return f"not all systems and temperatures have more than {runs} run{'s' * (runs > 1)}"

  left: dict[str, list[str]] = {}
  for folder in (f for f in scored if f not in kept):
    left.setdefault(reason(folder), []).append(str(folder.path))
  return frontier.compare_curves(counts, baseline, baseline), [
      f"{label}: the frontier leaves out {', '.join(paths)}: {why}." for why, paths in left.items()
  ]


def _counted(folder: Evaluated) -> list[dict[str, Any]]:
  """The lines of samples/frontier/SYSTEM.jsonl, as a run writes them.

  Distinct right answers are distinct texts where a benchmark says that there are many; elsewhere
  two right responses say the same in different words.
  """
  out = []
  for i in range(folder.prompts):
    records = folder.records[i * folder.samples : (i + 1) * folder.samples]
    right = [r["response"] for r in records if r["scores"]["accuracy"]]
    varied = "varied" in records[0]["groups"]
    out.append({
        "temperature": folder.settings["temperature"], "prompt": i,
        "groups": records[0]["groups"], "samples": len(records), "right": len(right),
        "distinct": len({" ".join(t.split()) if varied else "" for t in right}),
    })
  return out


# --- Examples -------------------------------------------------------------------------------------


def _texts(column: Benchmarked) -> bool:
  return all(folder.has_texts for folder in column.all)


def _widest(columns: Sequence[Benchmarked], folders: Sequence[Evaluated]) -> Benchmarked:
  """The first of the columns of a benchmark with the most systems."""
  return max((c for c in columns if c.all[0] in folders), key=lambda c: len(c.runs))


def _examples(column: Benchmarked, number: int) -> list[dict[str, Any]]:
  """Prompts whose first responses are scored most differently, those first in the data first."""
  firsts = {s: runs[0] for s, runs in column.runs.items() if column.score in runs[0].values}
  score = lambda run, i: run.first(i)["scores"].get(column.score)
  out = []
  for i in range(column.all[0].prompts):
    known = [x for run in firsts.values() if (x := score(run, i)) is not None]
    out.append((max(known, default=0) - min(known, default=0), i))
  chosen = sorted(out, key=lambda found: (-found[0], found[1]))[:number]
  return [
      {"benchmark": column.label, "metric": column.id(column.score), "index": i, "spread": spread,
       "responses": {s: _response(run.first(i), column.score) for s, run in firsts.items()},
       "prompt": column.all[0].first(i)["prompt"], "answer": column.all[0].first(i)["answer"]}
      for spread, i in chosen
  ]


def _response(record: Mapping[str, Any], name: str) -> dict[str, Any]:
  later = [text for turn in record.get("turns", ()) for text in (turn["prompt"], turn["response"])]
  return {"text": "\n\n".join([record["response"], *later]), "response": record["response"],
          "score": record["scores"].get(name), "hit_eos": record["hit_eos"]}
