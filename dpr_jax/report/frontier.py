"""The frontier of results.json: sentences, a table, and the data of its plot."""

from collections.abc import Mapping
from typing import Any

from dpr_jax.report import tables
from dpr_jax.report.render import finite, plain
from dpr_jax.report.tables import Results

_UNITS = ("answers", "points", "answers")  # of the differences, in the order of the table.


def sentences(results: Results) -> list[str]:
  """Whether the main system does more than a lower temperature of SFT would, and at what cost."""
  found, main = results.get("frontier") or {}, results.get("main") or ""
  out, who = [], tables.label(results, main)
  answers = f"distinct right answers in {found.get('k')} samples"
  equal = {
    "accuracy": ((found.get("equal_accuracy") or {}).get(main), answers, "answers"),
    "coverage": ((found.get("equal_coverage") or {}).get(main), "points of accuracy", "points"),
  }
  # A curve may lie wholly above the other one: then it is only at equal coverage that they meet.
  known = [(at, *x) for at, x in equal.items() if x[0] and finite(x[0].get("difference"))]
  if known:
    at, c, *unit = known[0]
    claim = {
      1: f"{who} does more than a lower temperature of SFT would",
      0: f"{who} is not shown to do more than a lower temperature of SFT would",
      -1: f"A lower temperature of SFT does better than {who}",
    }[tables.resolved(c)]
    out.append(f"{claim}: at equal {at}, {_gap(c, *unit)}.")
  elif equal["accuracy"][0]:
    out.append(f"Whether {who} does more than a lower temperature of SFT would cannot be said: "
               f"{equal['accuracy'][0].get('reason')}.")
  same = (found.get("equal_temperature") or {}).get(main)
  if same and finite(same["coverage"].get("difference")):
    c, t = same["coverage"], plain(same["temperature"])
    claim = {1: "grew", 0: "is not shown to have changed", -1: "shrank"}[tables.resolved(c)]
    gap = _gap(c, answers, "answers")
    out.append(f"The diversity of {who} {claim}: at temperature {t}, {gap}.")
  return out


def _gap(c: Mapping[str, Any], what: str, unit: str) -> str:
  found = tables.show(c["difference"], unit, sign=True)
  return f"{found} {what} against SFT {tables.interval(c, unit)}"


def table(results: Results) -> dict[str, Any] | None:
  """Systems by the first temperature of their curves, and their differences to SFT."""
  found = results.get("frontier") or {}
  if not found:
    return None
  first, other = plain(found["temperatures"][0]), tables.baseline_label(results)
  count = f"of {found['k']} samples"
  heads = [
    (f"Accuracy, temperature {first}", "%"), (f"Coverage, temperature {first}", count),
    (f"Pass@{found['k']}, temperature {first}", "%"),
    (f"Coverage minus {other} at equal accuracy", count),
    (f"Accuracy minus {other} at equal coverage", "points"),
    (f"Coverage minus {other} at temperature {first}", count),
  ]
  rows = []
  for name, points in found["curves"].items():
    shown = {"accuracy": "%", "coverage": "answers", "pass_at_k": "%"}
    cells = [tables.cell(points[0][key], unit) for key, unit in shown.items()]
    gaps = [(found.get(k) or {}).get(name) for k in ("equal_accuracy", "equal_coverage")]
    same = ((found.get("equal_temperature") or {}).get(name) or {}).get("coverage")
    cells += [tables.difference_cell(c, u) for c, u in zip([*gaps, same], _UNITS)]
    rows.append({"name": tables.label(results, name), "cells": cells})
  return tables.grid([{"label": text, "unit": unit, "n": ""} for text, unit in heads], rows)


def series(results: Results) -> dict[str, list[tuple[float, float, float]]]:
  """Label -> (temperature, accuracy, coverage) of its points, greedy last; the main system and SFT
  come first. The base model of a run, which seldom answers, would only stretch the axes."""
  curves = (results.get("frontier") or {}).get("curves") or {}
  order = [n for n in dict.fromkeys([results.get("main"), tables.baseline(results), *curves])
           if n in curves and (n != "base" or "baseline" in results)]
  return {
    tables.label(results, n): [
      (p["temperature"], p["accuracy"]["mean"], p["coverage"]["mean"]) for p in curves[n]
    ]
    for n in order
  }
