"""results.json of a sweep -> its table, and the data of its plot."""

from collections.abc import Mapping
from typing import Any

from dpr_jax.report import tables
from dpr_jax.report.corruption import main_auc
from dpr_jax.report.render import visible
from dpr_jax.report.tables import Results


def sweep_table(results: Results, links: bool) -> dict[str, Any] | None:
  """Points by metrics of the main system, its paired difference to SFT, and the other systems; None
  for a run that is no sweep. Marks are those of the difference to SFT.

  Args:
    links: whether the points' pages are beside this one.
  """
  points, primary = _points(results), primary_metric(results)
  if primary is None:
    return None
  judged, *others = systems_of(results)
  whole = {**results, "systems": _all_systems(results)}
  known = whole["systems"][judged]
  metrics = [m for m in tables.main_metrics(whole) if "/" not in m and m in known]
  columns = [(judged, m) for m in dict.fromkeys([primary, *metrics])]
  columns += [(name, primary) for name in others]
  about = {m: tables.column(results, m) for _, m in columns}
  title = lambda name, metric: f"{tables.label(results, name)}: {tables.in_sentence(about[metric])}"
  heads = [{"label": title(n, m), "unit": about[m]["unit"], "n": ""} for n, m in columns]
  unit = about[primary]["unit"]
  gap = f"{tables.label(results, judged)} minus SFT"
  heads.insert(1, {"label": gap, "unit": tables.of_difference(unit), "n": ""})
  heads.append({"label": "AUC of a corrupted token", "unit": "%", "n": ""})
  rows = []
  for point in points:
    cells = []
    for name, metric in columns:
      found = tables.difference(point, name, "sft", metric) if name == judged else None
      shown = tables.cell(point["systems"].get(name, {}).get(metric), about[metric]["unit"])
      cells.append({**shown, "n": "", "sign": tables.resolved(found) if found else 0})
    cells.insert(1, tables.difference_cell(tables.difference(point, judged, "sft", primary), unit))
    cells.append({**tables.cell(main_auc(point), "%"), "n": ""})
    href = f"../{point['folder']}/report/report.html" if links else ""
    rows.append({"name": visible(point["value"]), "href": href, "cells": cells})
  unused = [i for i in range(len(heads)) if all(r["cells"][i]["mean"] == "–" for r in rows)]
  for values in (heads, *(r["cells"] for r in rows)):
    for i in reversed(unused):
      del values[i]
  return {"head": visible(results["sweep"].get("field", "")), **tables.grid(heads, rows)}


def systems_of(results: Results) -> list[str]:
  """The system that a sweep is about, the main one where a point has it; then SFT and the others
  that the primary metric is known of. What SFT is made of is left out."""
  systems, primary = _all_systems(results), primary_metric(results)
  main = results.get("main")
  judged = main if main in systems else "sft"
  used = [n for n in systems if n not in ("base", "ref", judged) and primary in systems[n]]
  return [judged, *used]


def primary_metric(results: Results) -> str | None:
  return next(iter(tables.goals({**results, "systems": _all_systems(results)})), None)


def plot_series(results: Results, metric: str) -> dict[str, list[Any]]:
  """Label -> {mean, ci95} at each point (None where there is none), the judged system first."""
  points = _points(results)
  return {
    tables.label(results, n): [p["systems"].get(n, {}).get(metric) for p in points]
    for n in systems_of(results)
  }


def _points(results: Results) -> list[Mapping[str, Any]]:
  return (results.get("sweep") or {}).get("points") or []


def _all_systems(results: Results) -> dict[str, dict[str, Any]]:
  """What any point has of each system, in the order of the labels."""
  out: dict[str, dict[str, Any]] = {n: {} for n in results.get("labels") or ()}
  for point in _points(results):
    for name, metrics in point["systems"].items():
      out.setdefault(name, {}).update(metrics)
  return {name: metrics for name, metrics in out.items() if metrics}

