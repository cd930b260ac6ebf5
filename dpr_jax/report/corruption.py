"""results.json -> the table of corrupted tokens."""

from collections.abc import Mapping
from typing import Any

from dpr_jax.report.render import finite, number
from dpr_jax.report.tables import cell, difference_cell

_MEASURES = ("auc", "auc_gain", "lowest", "below_original")


def corruption_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One table for each kind of answers: rewards by measures, each a share with its interval."""
  titles, tables = results.get("corruption_titles") or {}, []
  title = lambda name: titles.get(name, name.replace("_", " "))
  for kind, found in (results.get("corruption") or {}).items():
    rows = []
    for name, of in found.items():
      if isinstance(of, Mapping):
        cells = [cell(of.get(m), "%") for m in _MEASURES]
        gain = of.get("auc_gain") or {}
        cells[1] = difference_cell({**gain, "difference": gain.get("mean")}, "points")
        rows.append({
          "name": title(name), "cells": cells, "n": cells[0]["n"] or cells[3]["n"],
        })
    chance = found.get("chance")
    tables.append({
      "title": title(kind)[:1].upper() + title(kind)[1:],
      "chance": number(100 * chance, 1) if finite(chance) else "",
      "rows": rows,
    })
  return tables


def main_auc(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The area of the first reward over the first kind of answers, all of them: {mean, ci95, n}."""
  kinds = iter((results.get("corruption") or {}).values())
  rewards = iter(next(kinds, {}).values())
  return (next(rewards, None) or {}).get("auc")
