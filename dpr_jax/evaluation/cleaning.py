"""What was left out of the demonstrations of `methods.cleaned_sft`, and how well it was chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation.auc import auc_interval
from dpr_jax.evaluation.statistics import interval
from dpr_jax.evaluation.token_scores import LABELS, REDUCE

FILE = "judged.jsonl"  # in the folder of the stage: a line for each demonstration.
SCORES = {f"{name}_{how}": f"AUC, {how} of {label}"
          for name, label in LABELS.items() for how in REDUCE}


def summarize(per_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Shares, and areas under the curve where it is known which demonstrations are wrong.

  Args:
    per_seed: for each seed the lines of its file.

  Returns:
    name -> {"mean", "ci95", "n"}: `kept`, `cut` and `unjudged`, of all; `wrong`, of those that were
    judged, `wrong_kept`, of the kept, and `wrong_cut`, of the cut; and `auc_SCORE`, the probability
    that a wrong demonstration has a lower score than a right one. What no seed, or only some, can
    have is absent.
  """
  flags = lambda lines, name: np.array([line[name] for line in lines], np.float64)
  judged = [[line for line in lines if line["judged"]] for lines in per_seed]
  out = {"kept": interval([flags(lines, "kept") for lines in per_seed])}
  out["unjudged"] = interval([1 - flags(lines, "judged") for lines in per_seed])
  out["cut"] = interval([flags(x, "judged") - flags(x, "kept") for x in per_seed])
  if not all("wrong" in line for lines in judged for line in lines):
    return out
  wrong = [flags(lines, "wrong") for lines in judged]
  kept = [flags(lines, "kept") > 0 for lines in judged]
  of = {"wrong": wrong, "wrong_kept": [w[k] for w, k in zip(wrong, kept)],
        "wrong_cut": [w[~k] for w, k in zip(wrong, kept)]}
  out |= {name: interval(values) for name, values in of.items() if all(map(len, values))}
  if not all(0 < w.sum() < len(w) for w in wrong):
    return out
  # Seeds have demonstrations of their own; that some are longer than others decides nothing.
  size = min(map(len, judged))
  has = lambda name: all(name in line for lines in judged for line in lines)
  for name in filter(has, SCORES):
    groups = [
        [(s[i : i + 1], s[:0]) if w[i] else (s[:0], s[i : i + 1]) for i in range(size)]
        for s, w in ((flags(lines, name), w) for lines, w in zip(judged, wrong))
    ]
    out[f"auc_{name}"] = auc_interval(groups)
  return out
