"""results.json of a sweep -> its table, and what its plot draws."""

import math
from collections.abc import Mapping
from typing import Any

from dpr_jax.report.render import finite, number, visible
from dpr_jax.report.tables import cell, difference, metric_label, resolved, show, system_label

_PRIMARY = ("accuracy_sampled", "token_f1_sampled")
_METRICS = (
  *_PRIMARY, "accuracy_greedy", "token_f1_greedy", "length_sampled", "heldout_nll", "reverse_kl",
  "forward_kl",
)
# Systems that a sweep may leave as they are; their lines tell what DPR is worth.
_REFERENCES = ("sft", "contrastive", "weight_extrapolation", "resampled",
               "low_temperature", "continued_sft")


def sweep_table(results: Mapping[str, Any], links: bool) -> dict[str, Any] | None:
  """Points by metrics of DPR, its paired difference to SFT, and the other systems; None for a run
  that is no sweep. Marks are those of the difference to SFT.

  Args:
    links: whether the points' pages stand beside this one.
  """
  points = (results.get("sweep") or {}).get("points") or ()
  primary = primary_metric(results)
  if not points or primary is None:
    return None
  judged = judged_system(results)
  used = lambda name, metric: any(metric in p["systems"].get(name, {}) for p in points)
  columns = [(judged, m) for m in _METRICS if used(judged, m)]
  columns += [(name, primary) for name in _REFERENCES if name != judged and used(name, primary)]
  rows = []
  for point in points:
    cells = []
    for name, metric in columns:
      found = cell(point["systems"].get(name, {}).get(metric), metric)
      gap = difference(point, name, "sft", metric) if name == judged else None
      cells.append({**found, "n": "", "sign": resolved(gap) if gap else 0})
    cells.insert(1, _gap_cell(point, judged, primary))
    cells.append(_auc_cell(point))
    href = f"../{point['folder']}/report/report.html" if links else ""
    rows.append({"name": visible(point["value"]), "href": href, "cells": cells})
  heads = [_head(name, metric) for name, metric in columns]
  less = {"label": f"{system_label(judged)} less SFT", "unit": "points"}
  heads.insert(1, less if metric_label(primary)[1] == "%" else {**less, "unit": ""})
  heads.append({"label": "AUC of a corrupted token", "unit": "%"})
  unused = [i for i in range(len(heads)) if all(r["cells"][i]["mean"] == "–" for r in rows)]
  for values in (heads, *(r["cells"] for r in rows)):
    for i in reversed(unused):
      del values[i]
  marked = any(c["sign"] for r in rows for c in r["cells"])
  field = results["sweep"].get("field", "")
  return {"head": visible(field), "columns": heads, "rows": rows, "marked": marked}


def judged_system(results: Mapping[str, Any]) -> str:
  """The system that a sweep is about: dpr, where a point has it."""
  points = results["sweep"]["points"]
  return "dpr" if any("dpr" in p["systems"] for p in points) else "sft"


def primary_metric(results: Mapping[str, Any]) -> str | None:
  points = (results.get("sweep") or {}).get("points") or ()
  known = [m for m in _PRIMARY if any(m in s for p in points for s in p["systems"].values())]
  return known[0] if known else None


def plot_series(results: Mapping[str, Any], metric: str) -> dict[str, list[Any]]:
  """Label -> {mean, ci95} at each point (None where there is none), the judged system first."""
  points = results["sweep"]["points"]
  names = dict.fromkeys((judged_system(results), *_REFERENCES))
  entries = {name: [p["systems"].get(name, {}).get(metric) for p in points] for name in names}
  return {system_label(name): found for name, found in entries.items() if any(found)}


def _head(name: str, metric: str) -> dict[str, str]:
  label, unit = metric_label(metric)
  return {"label": f"{system_label(name)}: {label[:1].lower()}{label[1:]}", "unit": unit}


def _gap_cell(point: Mapping[str, Any], judged: str, metric: str) -> dict[str, Any]:
  found = difference(point, judged, "sft", metric)
  if not found:
    return {"mean": "–", "ci": "", "n": "", "sign": 0}
  low, high = (show(x, metric, sign=True) for x in found["ci95"])
  mean = show(found["difference"], metric, sign=True)
  return {"mean": mean, "ci": f"{low} – {high}", "n": "", "sign": resolved(found)}


def _auc_cell(point: Mapping[str, Any]) -> dict[str, Any]:
  entry = (point.get("corruption") or {}).get("all", {}).get("baseline_relative", {}).get("auc")
  return {**share_cell(entry), "n": ""}


def share_cell(entry: Mapping[str, Any] | None, sign: bool = False) -> dict[str, Any]:
  """A share, or with `sign` a difference of two, with its interval, as per cent."""
  low, high = (entry or {}).get("ci95") or (math.nan, math.nan)
  known = finite(low) and finite(high)
  percent = lambda x: number(100 * x, 1, sign) if finite(x) else "–"
  return {
    "mean": percent((entry or {}).get("mean")),
    "ci": f"{percent(low)} – {percent(high)}" if known else "",
    "n": f"{entry['n']:,}" if entry and finite(entry.get("n")) else "",
    "sign": 0,
  }
