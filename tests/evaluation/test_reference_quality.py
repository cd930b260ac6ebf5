"""The measures of a reference against loops, and which candidate is chosen."""

import numpy as np
import pytest

from dpr_jax.evaluation.reference_quality import choose, reward_statistics


def test_statistics_of_token_rewards(rng):
  rewards = [rng.normal(0.1, 1.0, n).astype(np.float32) for n in rng.integers(1, 9, 12)]
  got = reward_statistics(rewards)
  flat = [float(x) for r in rewards for x in r]
  totals = [sum(map(float, r)) for r in rewards]
  assert got["kl"] == pytest.approx(np.mean(totals), abs=1e-6)
  assert got["kl_se"] == pytest.approx(np.std(totals, ddof=1) / np.sqrt(12), abs=1e-6)
  assert got["snr"] == pytest.approx(np.mean(flat) / np.std(flat), abs=1e-6)
  assert reward_statistics([np.zeros(3, np.float32)])["snr"] == 0.0


def test_the_largest_is_chosen_and_the_earliest_of_equals():
  table = [{"auc": 0.6, "snr": 0.1}, {"auc": 0.7, "snr": float("nan")}, {"auc": 0.7, "snr": 0.2}]
  assert choose(table, "validation") == 1 and choose(table, "snr") == 2
  with pytest.raises(ValueError, match="finite snr"):
    choose(table[1:2], "snr")
