"""results.json -> the table of demonstrations that were left out."""

from collections.abc import Mapping
from typing import Any

from dpr_jax.evaluation.cleaning import SCORES
from dpr_jax.report.tables import cell, label

_COLUMNS = {
    "kept": "Kept", "cut": "Cut", "tokens_cut": "Tokens left out", "unjudged": "Not judged",
    "wrong": "Wrong among the judged", "wrong_kept": "Wrong among the kept",
    "wrong_cut": "Wrong among the cut", "right_cut": "Right ones that are cut",
    **{f"auc_{score}": text for score, text in SCORES.items()},
}


def cleaning_table(results: Mapping[str, Any]) -> dict[str, Any] | None:
  """Methods by shares of demonstrations, those columns that any of them has."""
  found = results.get("cleaning") or {}
  groups = {name for of in found.values() for name in of if name.startswith("right_cut/")}
  named = _COLUMNS | {n: f"Right ones cut, {n.partition('/')[2]}" for n in sorted(groups)}
  columns = {n: text for n, text in named.items() if any(n in of for of in found.values())}
  rows = [{"name": label(results, name), "cells": [cell(of.get(c), "%") for c in columns]}
          for name, of in found.items()]
  heads = [{"label": text, "unit": "%"} for text in columns.values()]
  return {"head": "Method", "columns": heads, "rows": rows} if rows else None
