"""What was left out of the demonstrations of `methods.cleaned_sft`, and how well it was chosen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.evaluation.auc import auc_interval
from dpr_jax.evaluation.statistics import interval
from dpr_jax.evaluation.token_scores import LABELS, NAMES, REDUCE

FILE = "judged.jsonl"  # in the folder of the stage: a line for each demonstration.
# Scores of trained tokens that a line has -> their field in it.
TOKENS = {name: NAMES[name] for name in ("reward", "logp_sft")}
RIVALS = ("aum", "forgetting", "confident")  # See `training_dynamics`.
SCORES = {
    **{f"{name}_{how}": f"AUC, {how} of {label}" for name, label in LABELS.items()
       for how in REDUCE},
    **{f"aum_{how}": f"AUC, {how} of the area under the margin" for how in REDUCE},
    "forgetting": "AUC, forgetting", "confident": "AUC, confident learning",
}

Lines = Sequence[Mapping[str, Any]]


def summarize(per_seed: Sequence[Lines]) -> dict[str, Any]:
  """Shares, and areas under the curve where it is known which demonstrations are wrong.

  Args:
    per_seed: for each seed the lines of its file.

  Returns:
    name -> {"mean", "ci95", "n"}: `kept`, `cut` and `unjudged`, of all; `wrong`, of those that were
    judged, `wrong_kept`, of the kept, and `wrong_cut`, of the cut; `right_cut`, of the right ones,
    and right_cut/GROUP of a built-in task or of a
    minority; and `auc_SCORE`, the probability that a wrong demonstration has a lower score than a
    right one. Of tokens that were left out: `tokens_cut`. What no seed, or only some, can have is
    absent.
  """
  judged = [[line for line in lines if line["judged"]] for lines in per_seed]
  out = {"kept": interval([_flags(lines, "kept") for lines in per_seed])}
  out["unjudged"] = interval([1 - _flags(lines, "judged") for lines in per_seed])
  out["cut"] = interval([_flags(x, "judged") - _flags(x, "kept") for x in per_seed])
  if all("tokens_kept" in line for lines in judged for line in lines):
    out["tokens_cut"] = interval(
        [1 - np.concatenate([line["tokens_kept"] for line in lines]) for lines in judged]
    )
  if not all("wrong" in line for lines in judged for line in lines):
    return out
  out |= _right_cut(judged)
  wrong = [_flags(lines, "wrong") for lines in judged]
  kept = [_flags(lines, "kept") > 0 for lines in judged]
  of = {"wrong": wrong, "wrong_kept": [w[k] for w, k in zip(wrong, kept)],
        "wrong_cut": [w[~k] for w, k in zip(wrong, kept)]}
  out |= {name: interval(values) for name, values in of.items() if all(map(len, values))}
  return out | _areas(judged, wrong)


def _flags(lines: Lines, name: str) -> np.ndarray:
  return np.array([line[name] for line in lines], np.float64)


def _right_cut(judged: Sequence[Lines]) -> dict[str, Any]:
  """The harm: the share of right demonstrations that are cut, of all and of groups of them."""
  tasks = {line["task"] for lines in judged for line in lines if "task" in line}
  groups: dict[str, Callable[[Mapping[str, Any]], bool]] = {"": lambda line: True}
  groups |= {f"/{task}": lambda line, t=task: line.get("task") == t for task in sorted(tasks)}
  groups["/minority"] = lambda line: line.get("minority", False)
  found = {
      group: [1 - _flags([x for x in lines if of(x) and not x["wrong"]], "kept")
              for lines in judged]
      for group, of in groups.items()
  }
  return {f"right_cut{group}": interval(cut) for group, cut in found.items() if all(map(len, cut))}


def _areas(judged: Sequence[Lines], wrong: Sequence[np.ndarray]) -> dict[str, Any]:
  if not all(0 < w.sum() < len(w) for w in wrong):
    return {}
  out = {}
  # Seeds have demonstrations of their own; that some are longer than others decides nothing.
  size = min(map(len, judged))
  has = lambda name: all(name in line for lines in judged for line in lines)
  for name in filter(has, SCORES):
    groups = [
        [(s[i : i + 1], s[:0]) if w[i] else (s[:0], s[i : i + 1]) for i in range(size)]
        for s, w in ((_flags(lines, name), w) for lines, w in zip(judged, wrong))
    ]
    out[f"auc_{name}"] = auc_interval(groups)
  return out
