"""The measures of a reference against loops, and what is chosen."""

import numpy as np
import pytest

from dpr_jax.rewards.selection import auc, choose, corrupt, reward_statistics


def test_one_token_before_the_end_is_replaced_by_one_from_elsewhere(rng):
  responses = [rng.integers(2, 9, n).astype(np.int32) for n in (5, 3, 8, 4)]
  responses = [np.append(r, 1).astype(np.int32) for r in responses]  # 1 ends a response.
  responses.append(np.array([1], np.int32))  # nothing to replace.
  kept = [r.copy() for r in responses]
  pool = set(np.concatenate([r[:-1] for r in responses]).tolist())
  copies, places = corrupt(responses, rng)
  for response, before, copy, place in zip(responses, kept, copies, places, strict=True):
    np.testing.assert_array_equal(response, before)
    changed = np.flatnonzero(copy != response)
    if len(response) == 1:
      assert place == -1 and not len(changed)
    else:
      assert changed.tolist() == [place] and place < len(response) - 1 and copy[place] in pool


def test_where_all_tokens_are_equal_nothing_is_replaced(rng):
  same = [np.array([4, 4, 1], np.int32)] * 2
  copies, places = corrupt(same, rng)
  assert places.tolist() == [-1, -1]
  np.testing.assert_array_equal(copies, same)
  assert corrupt([], rng)[0] == []


def test_auc_counts_pairs(rng):
  good, bad = rng.integers(0, 6, 30) / 2, rng.integers(0, 5, 20) / 2  # with ties.
  pairs = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
  assert auc(good, bad) == pytest.approx(np.mean(pairs), abs=1e-12)
  assert auc(np.array([2.0]), np.array([1.0])) == 1.0
  assert np.isnan(auc(good, np.zeros(0)))


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
