"""results.json -> what the tables of the page show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.report.render import finite, number, significant

Results = Mapping[str, Any]


def label(results: Results, name: str) -> str:
  """How a system, or a stage, is called."""
  return (results.get("labels") or {}).get(name) or name.replace("_", " ")


def baseline(results: Results) -> str:
  """The system that the others are compared with: SFT in a run."""
  return results.get("baseline") or "sft"


def baseline_label(results: Results) -> str:
  return label(results, results["baseline"]) if "baseline" in results else "SFT"


def column(results: Results, metric: str) -> Mapping[str, Any]:
  """The fields of `evaluation.metrics.Column`."""
  unknown = {"label": metric.replace("_", " "), "unit": "", "better": 0, "main": False}
  return {**unknown, **((results.get("columns") or {}).get(metric) or {})}


def heading(results: Results, metric: str) -> str:
  """Accuracy, sampled (%)."""
  found = column(results, metric)
  return found["label"] + (f" ({found['unit']})" if found["unit"] else "")


def in_sentence(about: Mapping[str, Any]) -> str:
  """The label of a column within a sentence: "accuracy, sampled", but "NLL of samples"."""
  text = about["label"]
  return text[:1].lower() + text[1:] if text[1:2].islower() else text


def main_metrics(results: Results) -> list[str]:
  """Those of the first table, what is better the higher it is first."""
  found = [m for m in _metrics(results) if column(results, m)["main"]]
  return sorted(found, key=lambda m: column(results, m)["better"] != 1)


def goals(results: Results) -> list[str]:
  """What a system is for: main metrics of sampled responses with a direction."""
  columns = {m: column(results, m) for m in main_metrics(results) if m.endswith("_sampled")}
  return [m for m, c in columns.items() if c["better"] and c.get("compared")]


def show(x: Any, unit: str, sign: bool = False) -> str:
  """A value in its unit: shares as per cent, lengths with one decimal."""
  digits = 2 if unit == "answers" or unit.startswith("nats") else {"tokens": 1}.get(unit)
  if unit in ("%", "points") and finite(x):
    return number(100 * x, 1, sign)
  if digits:
    return number(x, digits, sign)
  text = significant(x)
  return f"+{text}" if sign and finite(x) and x > 0 else text


def of_difference(unit: str) -> str:
  """The unit of a difference."""
  return "points" if unit == "%" else unit


def results_table(results: Results) -> dict[str, Any] | None:
  """Systems by main metrics; see `table`."""
  return table(results, main_metrics(results))


def more_metrics(results: Results) -> dict[str, Any] | None:
  """Whatever else was measured, groups of prompts apart."""
  main = main_metrics(results)
  return table(results, [m for m in _metrics(results) if m not in main and "/" not in m])


def task_tables(results: Results) -> list[dict[str, Any]]:
  """One table for each metric that is split by groups of prompts: groups by systems."""
  systems = _systems(results)
  groups: dict[str, dict[str, str]] = {}
  for metric in _metrics(results):
    base, slash, group = metric.partition("/")
    if slash:
      name = column(results, metric)["label"].removeprefix(column(results, base)["label"] + ", ")
      groups.setdefault(base, {})[group] = name if "/" not in name else group
  tables = []
  for base, named in groups.items():
    used = [s for s, metrics in systems.items() if any(f"{base}/{g}" in metrics for g in named)]
    unit, rows = column(results, base)["unit"], []
    # Groups that have a name of their own hold others; they come last.
    for group, name in sorted(named.items(), key=lambda item: item[0] != item[1]):
      cells = [cell(systems[s].get(f"{base}/{group}"), unit) for s in used]
      counts = {c["n"] for c in cells if c["n"]}
      rows.append({"name": name, "cells": cells, "n": counts.pop() if len(counts) == 1 else ""})
    tables.append({
      "title": heading(results, base), "columns": [label(results, s) for s in used], "rows": rows,
    })
  return tables


def comparisons_table(results: Results) -> list[dict[str, Any]]:
  """Differences with interval, p and verdict; the bar is drawn on a scale of its unit."""
  found = [
    c for c in results.get("comparisons") or () if len(c.get("pair") or ()) == 2 and "metric" in c
  ]
  scale: dict[str, float] = {}
  for c in found:
    unit = column(results, c["metric"])["unit"]
    ends = [abs(x) for x in (c.get("difference"), *(c.get("ci95") or ())) if finite(x)]
    scale[unit] = max([scale.get(unit, 1e-12), *ends])
  rows = []
  for c in found:
    a, b = (label(results, x) for x in c["pair"])
    about = column(results, c["metric"])
    unit = about["unit"]
    low, high = _ends(c)
    sign = resolved(c)
    rows.append({
      "a": a,
      "b": b,
      "metric": about["label"],
      "aim": bool(about["better"]),
      "unit": of_difference(unit),
      "difference": show(c.get("difference"), unit, sign=True),
      "ci": interval(c, unit),
      "p": p_value(c.get("p")),
      "sign": sign,
      "verdict": {1: "above 0", -1: "below 0", 0: "may be 0"}[sign],
      "bar": all(map(finite, (low, high, c.get("difference")))) and {
        k: round(50 + 46 * x / scale[unit], 2)
        for k, x in (("low", low), ("high", high), ("at", c["difference"]))
      },
    })
  return rows


def resolved(comparison: Mapping[str, Any]) -> int:
  """1 or -1, the sign of a difference whose interval excludes 0 and whose p is below 0.05; else 0.

  Both, because an exact test of few differing prompts is stricter than any interval.
  """
  low, high = _ends(comparison)
  p = comparison.get("p")
  if not finite(low) or not finite(high) or (finite(p) and p >= 0.05):
    return 0
  return 1 if low > 0 else -1 if high < 0 else 0


def headline(results: Results) -> str:
  """Whether the main system is better than SFT and the other trained systems, no stronger than the
  intervals."""
  main, metric = results.get("main") or "", next(iter(goals(results)), "")
  entry = _systems(results).get(main, {}).get(metric)
  if not entry or not finite(entry.get("mean")):
    return ""
  about, who = column(results, metric), label(results, main)
  unit = about["unit"]
  said: dict[int, list[str]] = {1: [], 0: [], -1: []}
  for other in dict.fromkeys(["sft", *(results.get("stages") or ())]):
    c = difference(results, main, other, metric)
    if c and other != main:
      said[about["better"] * resolved(c)].append(
        f"{label(results, other)} ({gap(c, unit)} {interval(c, unit)})"
      )
  verbs = {1: "is better than", 0: "cannot be told apart from", -1: "is worse than"}
  parts = [f"It {verbs[sign]} {_and(others)}." for sign, others in said.items() if others]
  shown = "%" if unit == "%" else f" {unit}".rstrip()
  return " ".join([f"{about['label']}: {who} reaches {show(entry['mean'], unit)}{shown}.", *parts])


def gap(comparison: Mapping[str, Any], unit: str) -> str:
  """+8.0 points"""
  return f"{show(comparison['difference'], unit, sign=True)} {of_difference(unit)}".strip()


def interval(comparison: Mapping[str, Any], unit: str) -> str:
  """[+2.0, +18.0]"""
  low, high = (show(x, unit, sign=True) for x in _ends(comparison))
  return f"[{low}, {high}]"


def p_value(p: Any) -> str:
  if not finite(p):
    return "–"
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def difference(results: Results, a: str, b: str, metric: str):
  """The comparison of a minus b, from either order of the pair; None if they were not compared."""
  for c in results.get("comparisons") or ():
    if c.get("metric") != metric or not all(map(finite, (c.get("difference"), *_ends(c)))):
      continue
    if list(c.get("pair") or ()) == [a, b]:
      return c
    if list(c.get("pair") or ()) == [b, a]:
      return {**c, "difference": -c["difference"], "ci95": [-x for x in reversed(c["ci95"])]}
  return None


def cell(entry: Any, unit: str) -> dict[str, Any]:
  """What a table shows of {mean, ci95, n}."""
  if not isinstance(entry, Mapping):
    return {"mean": "–", "ci": "", "n": "", "sign": 0}
  low, high = _ends(entry)
  known = finite(low) and finite(high)
  return {
    "mean": show(entry.get("mean"), unit),
    "ci": f"{show(low, unit)} – {show(high, unit)}" if known else "",
    "n": f"{entry['n']:,}" if finite(entry.get("n")) else "",
    "sign": 0,
  }


def difference_cell(comparison: Mapping[str, Any] | None, unit: str) -> dict[str, Any]:
  """What a table shows of {difference, ci95, p}; of an unknown difference, its reason."""
  if not comparison or not finite(comparison.get("difference")):
    why = (comparison or {}).get("reason", "")
    return {"mean": "–", "ci": "", "n": "", "sign": 0, "why": why}
  shown = show(comparison["difference"], unit, sign=True)
  sign = resolved(comparison)
  return {"mean": shown, "ci": interval(comparison, unit), "n": "", "sign": sign}


def grid(columns: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """A table of cells; a number of responses that all rows share is said once, in the heading."""
  for i, head in enumerate(columns):
    counts = {row["cells"][i]["n"] for row in rows if row["cells"][i]["n"]}
    if len(counts) == 1:
      head["n"] = counts.pop()
      for row in rows:
        row["cells"][i]["n"] = ""
  marked = any(c["sign"] for row in rows for c in row["cells"])
  return {"columns": columns, "rows": rows, "marked": marked}


def _ends(entry: Mapping[str, Any]) -> tuple[Any, Any]:
  low, high = entry.get("ci95") or (math.nan, math.nan)
  return low, high


def _and(items: Sequence[str]) -> str:
  return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _systems(results: Results) -> Mapping[str, Mapping[str, Any]]:
  return results.get("systems") or {}


def _metrics(results: Results) -> list[str]:
  """All that was measured of any system."""
  return list(dict.fromkeys(m for metrics in _systems(results).values() for m in metrics))


def table(results: Results, metrics: Sequence[str]) -> dict[str, Any] | None:
  """Systems by metrics; `sign` where the interval of the difference to the baseline excludes 0."""
  systems = _systems(results)
  if not systems or not metrics:
    return None
  about = [column(results, m) for m in metrics]
  rows = []
  for name, values in systems.items():
    cells = [cell(values.get(m), c["unit"]) for m, c in zip(metrics, about)]
    for metric, shown in zip(metrics, cells):
      found = difference(results, name, baseline(results), metric)
      shown["sign"] = resolved(found) if found else 0
    rows.append({"name": label(results, name), "cells": cells})
  notes = " ".join(dict.fromkeys(c["note"] for c in about if c.get("note")))
  heads = [{"label": c["label"], "unit": c["unit"], "n": ""} for c in about]
  return {**grid(heads, rows), "note": notes}
