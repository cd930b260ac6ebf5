"""results.json -> the table of corrupted tokens."""

from collections.abc import Mapping
from typing import Any

from dpr_jax.report.render import finite, number
from dpr_jax.report.sweeps import share_cell

_REWARDS = {
  "baseline_relative": "log π_sft − log π_ref", "log_likelihood": "log π_sft",
  "endogenous": "endogenous",
}
_KINDS = {"all": "all", "unique": "one right answer", "varied": "many right answers"}


def corruption_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One table for each kind of task: rewards by measures, each a share with its interval."""
  tables = []
  for kind, found in (results.get("corruption") or {}).items():
    rows = [
      {
        "name": _REWARDS[name],
        "cells": [
          share_cell(found[name].get(m), sign=m == "auc_gain")
          for m in ("auc", "auc_gain", "lowest", "below_original")
        ],
      }
      for name in _REWARDS if name in found
    ]
    for row in rows:
      row["n"] = row["cells"][0]["n"] or row["cells"][3]["n"]
    chance = found.get("chance")
    title = "All answers" if kind == "all" else f"Tasks with {_KINDS.get(kind, kind)}"
    tables.append({
      "title": title,
      "chance": number(100 * chance, 1) if finite(chance) else "",
      "rows": rows,
    })
  return tables
