"""The area under the ROC curve against counting pairs, and what its interval must do."""

import itertools
import math

import numpy as np
import pytest

from dpr_jax.evaluation.auc import auc, auc_difference, auc_interval


def naive(low, high):
  wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in itertools.product(low, high)]
  return sum(wins) / len(wins)


def test_ranks_agree_with_counting_pairs(rng):
  for _ in range(30):
    low, high = (rng.integers(0, 9, rng.integers(1, 30)) / 8 for _ in range(2))  # Many ties.
    assert auc(low, high) == pytest.approx(naive(low, high), abs=1e-12)
    assert auc(low, high) + auc(high, low) == pytest.approx(1.0, abs=1e-12)
  low, high = rng.normal(size=40), rng.normal(size=70)
  assert auc(low, high) == pytest.approx(naive(low, high), abs=1e-12)


def test_weights_are_repetitions(rng):
  low, high = rng.integers(0, 5, 12), rng.integers(0, 5, 9)
  a, b = rng.integers(0, 4, 12), rng.integers(1, 4, 9)
  a[0] = 2
  expected = naive(np.repeat(low, a), np.repeat(high, b))
  assert auc(low, high, a, b) == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_scale():
  assert auc([-2.0, -1.0], [0.0, 1.0]) == 1.0
  assert auc([1.0], [0.0]) == 0.0
  assert auc([1.0, 1.0], [1.0]) == 0.5
  assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))


def groups_of(rng, count, shift):
  return [
      (rng.normal(-shift, 1, 1), rng.normal(0, 1, rng.integers(0, 6))) for _ in range(count)
  ]


def test_the_mean_is_of_all_groups_and_lies_in_its_interval(rng):
  seeds = [groups_of(rng, 60, 1.0) for _ in range(3)]
  areas = [
      naive(np.concatenate([g[0] for g in groups]), np.concatenate([g[1] for g in groups]))
      for groups in seeds
  ]
  one, three = auc_interval(seeds[:1]), auc_interval(seeds)
  assert one["mean"] == pytest.approx(areas[0], abs=1e-12) and one["n"] == 60
  assert three["mean"] == pytest.approx(np.mean(areas), abs=1e-12) and three["n"] == 180
  for found in (one, three):
    low, high = found["ci95"]
    assert 0 <= low < found["mean"] < high <= 1
  assert auc_interval(seeds) == three  # The draws are those of a seed of its own.


def test_the_interval_of_one_seed_covers_the_truth():
  # P(X < Y) of two normal values a distance apart.
  noise, truth, hits = np.random.default_rng(7), 0.5 * (1 + math.erf(1 / 2)), 0
  for _ in range(60):
    low, high = auc_interval([groups_of(noise, 80, 1.0)])["ci95"]
    hits += low <= truth <= high
  assert hits >= 51  # 95% in expectation; below 85% of 60 has a chance under 0.002.


def test_without_negatives_it_is_unknown():
  found = auc_interval([[(np.array([1.0]), np.zeros(0))] * 3])
  assert math.isnan(found["mean"]) and math.isnan(found["ci95"][0])
  with pytest.raises(ValueError, match="as many groups"):
    auc_interval([[(np.array([1.0]), np.zeros(1))], []])


def test_a_difference_is_paired(rng):
  seeds = [groups_of(rng, 80, 1.0) for _ in range(2)]
  worse = [[(low + rng.normal(0.3, 0.1), high) for low, high in groups] for groups in seeds]
  for count in (1, 2):
    a, b = auc_interval(seeds[:count]), auc_interval(worse[:count])
    found = auc_difference(seeds[:count], worse[:count])
    assert found["mean"] == pytest.approx(a["mean"] - b["mean"], abs=1e-12)
    low, high = found["ci95"]
    assert low < found["mean"] < high
  found = auc_difference(seeds[:1], worse[:1])["ci95"]
  widths = [np.diff(auc_interval(x[:1])["ci95"])[0] for x in (seeds, worse)]
  assert found[1] - found[0] < max(widths)  # The noise that both share is gone.
  same = auc_difference(seeds, seeds)
  assert same["mean"] == 0 and same["ci95"] == [0, 0]
  with pytest.raises(ValueError, match="paired"):
    auc_difference(seeds[:1], seeds)
