"""Folders that `evaluate` has filled -> systems side by side: a pure function of their files."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation import frontier
from dpr_jax.evaluation.benchmark_columns import (
  Benchmarked,
  asked,
  check_column,
  column_notes,
  describe_column,
  group_folders,
  shown_value,
  split_columns,
  ways,
  written_by,
)
from dpr_jax.evaluation.evaluated import Evaluated
from dpr_jax.evaluation.statistics import compare, interval

_EXAMPLES = 12  # prompts whose responses are shown, shared out among the benchmarks.


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
  groups = group_folders(folders)
  columns = [column for group in groups for column in split_columns(*group)]
  for column in columns:
    check_column(column)
  out: dict[str, Any] = {
      "systems": {name: {} for name in systems}, "labels": {name: name for name in systems},
      "baseline": systems[0], "main": systems[-1], "columns": {}, "comparisons": [],
      "benchmarks": [describe_column(column) for column in columns],
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
  shown = [c for c in (_widest(columns, of) for _, of in groups) if c.score and c.has_texts]
  out["examples"] = [e for c in shown for e in _examples(c, max(2, _EXAMPLES // len(shown)))]
  out["notes"] = [note for column in columns for note in column_notes(column)]
  out["notes"] += [note for _, notes in frontiers.values() for note in notes]
  return out


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
  written = written_by([folder for column in columns for folder in column.all])
  for column in columns:
    first = column.all[0]
    if "benchmark.reference" not in first.settings or column.figure != "win_rate":
      continue
    reference = shown_value(first.settings["benchmark.reference"], written) or "the data's own"
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
  way = lambda f: str({k: v for k, v in ways(f).items() if k not in ("temperature", "samples")})
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
  if any(asked(f) != asked(kept[0]) for f in kept):
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
