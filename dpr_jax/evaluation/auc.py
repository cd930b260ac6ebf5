"""Area under the ROC curve by ranks, with an interval over groups and seeds.

    AUC = P(low < high) + P(low = high) / 2,   low and high sampled each from its own values:

the Mann-Whitney statistic over the number of pairs (Hanley and McNeil, 1982).
"""

import math
from collections.abc import Sequence

import numpy as np

from dpr_jax.evaluation.statistics import bootstrapped

RESAMPLES = 1_000  # bootstrap samples of an interval.

# Values that should rank low and values that should rank high in one demonstration: [P], [N].
Group = tuple[np.ndarray, np.ndarray]


def auc(
    low: np.ndarray, high: np.ndarray, low_weight: np.ndarray | None = None,
    high_weight: np.ndarray | None = None,
) -> float:
  """Probability that a value of `low`, [P], lies below one of `high`, [N]; a tie counts half.

  Args:
    low_weight, high_weight: how often each value counts, [P] and [N]; by default once.

  Returns:
    The area, NaN if there is no value on one side.
  """
  low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
  return _weighted(*_ranked(low, high), low_weight, high_weight)


def _ranked(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Positions of all values among the distinct ones, from the lowest."""
  _, index = np.unique(np.concatenate([low, high]), return_inverse=True)
  return index[: len(low)], index[len(low) :]


def _weighted(low_rank, high_rank, low_weight=None, high_weight=None) -> float:
  low_weight = np.ones(len(low_rank)) if low_weight is None else low_weight
  high_weight = np.ones(len(high_rank)) if high_weight is None else high_weight
  pairs = float(low_weight.sum() * high_weight.sum())
  if not pairs:
    return math.nan
  size = int(max(low_rank.max(), high_rank.max())) + 1
  at = np.bincount(high_rank, high_weight, size)
  above = at.sum() - np.cumsum(at)
  return float(np.sum(low_weight * (above + at / 2)[low_rank])) / pairs


def auc_interval(per_seed: Sequence[Sequence[Group]]) -> dict[str, object]:
  """AUC over all groups (demonstrations), mean over seeds, with a 95% bootstrap interval.

  Whole groups are sampled, because values of one group are not independent; all seeds sample the
  same ones. The interval is that of `statistics.bootstrapped`.

  Args:
    per_seed: for each seed its groups; the i-th is of the same demonstration in every seed.

  Returns:
    mean, ci95 [low, high] within [0, 1] (NaN where unknown), n (groups in all seeds together).

  Raises:
    ValueError: no seed, or seeds with different numbers of groups.
  """
  areas, resampled = _all_areas(per_seed)
  return _interval(areas, resampled, len(per_seed[0]), 0.0)


def auc_difference(
    a_per_seed: Sequence[Sequence[Group]], b_per_seed: Sequence[Sequence[Group]]
) -> dict[str, object]:
  """AUC of a minus that of b on the same groups, paired: both see the same resamples of groups.

  Returns and raises as `auc_interval`.
  """
  (a, a_resampled), (b, b_resampled) = (_all_areas(x) for x in (a_per_seed, b_per_seed))
  if a.shape != b.shape or len(a_per_seed[0]) != len(b_per_seed[0]):
    raise ValueError("a and b must be paired: as many seeds and groups in one as in the other")
  return _interval(a - b, a_resampled - b_resampled, len(a_per_seed[0]), -1.0)


def _all_areas(per_seed) -> tuple[np.ndarray, np.ndarray]:
  """(area of each seed [S], areas of its resamples [S, RESAMPLES])."""
  if not per_seed or len({len(groups) for groups in per_seed}) != 1:
    raise ValueError("give at least one seed, and as many groups in each as in the others")
  found = [_areas(groups, np.random.default_rng(0)) for groups in per_seed]
  return np.array([area for area, _ in found]), np.stack([areas for _, areas in found])


def _interval(
    areas: np.ndarray, resampled: np.ndarray, count: int, lowest: float
) -> dict[str, object]:
  ends = np.clip(bootstrapped(areas, resampled, count)["ci95"], lowest, 1.0)
  return {"mean": float(areas.mean()), "ci95": ends.tolist(), "n": count * len(areas)}


def _areas(groups: Sequence[Group], rng: np.random.Generator) -> tuple[float, np.ndarray]:
  """(area, areas of RESAMPLES bootstrap samples of the groups)."""
  low_group = np.repeat(np.arange(len(groups)), [len(low) for low, _ in groups])
  high_group = np.repeat(np.arange(len(groups)), [len(high) for _, high in groups])
  join = lambda side: np.concatenate([np.zeros(0), *(group[side] for group in groups)])
  ranks = _ranked(join(0), join(1))
  if not len(low_group) or not len(high_group):
    return math.nan, np.full(RESAMPLES, math.nan)
  resampled = np.empty(RESAMPLES)
  for i in range(RESAMPLES):
    times = np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups))
    resampled[i] = _weighted(*ranks, times[low_group], times[high_group])
  return _weighted(*ranks), resampled
