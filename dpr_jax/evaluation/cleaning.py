"""What was left out of the demonstrations of `methods.cleaned_sft`, and how well it was chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation.auc import auc
from dpr_jax.evaluation.statistics import interval

FILE = "judged.jsonl"  # in the folder of the stage: a line for each demonstration.
SCORES = tuple(f"{what}_{reduce}" for what in ("reward", "logp_sft")
               for reduce in ("sum", "mean", "min"))


def summarize(per_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Shares, and areas under the curve where it is known which demonstrations are wrong.

  Args:
    per_seed: for each seed the lines of its file.

  Returns:
    name -> {"mean", "ci95", "n"}: `kept`, of all; `wrong`, of all, `wrong_kept`, of the kept,
    `wrong_cut`, of those that were cut; and `auc_SCORE`, the probability that a wrong
    demonstration has a lower score than a right one: its interval is over seeds.
  """
  judged = [[line for line in lines if line["judged"]] for lines in per_seed]
  flags = lambda lines, name: np.array([line[name] for line in lines], np.float64)
  out = {"kept": interval([flags(lines, "kept") for lines in judged])}
  if not all("wrong" in line for lines in judged for line in lines):
    return out
  wrong = [flags(lines, "wrong") for lines in judged]
  kept = [flags(lines, "kept") > 0 for lines in judged]
  of = {"wrong": wrong, "wrong_kept": [w[k] for w, k in zip(wrong, kept)],
        "wrong_cut": [w[~k] for w, k in zip(wrong, kept)]}
  out |= {name: interval(values) for name, values in of.items() if all(map(len, values))}
  for name in SCORES:
    scores = [flags(lines, name) for lines in judged]
    areas = [auc(s[w > 0], s[w == 0]) for s, w in zip(scores, wrong)]
    out[f"auc_{name}"] = interval([np.array([area]) for area in areas])
  return out
