"""Monitors against loops in plain Python."""

import jax
import numpy as np
import pytest

from dpr_jax.rollout import Rollout
from dpr_jax.rollout.monitors import distinct_bigrams, rollout_metrics


def _rollout(rng, batch=7, n=6, p=3):
  lengths = rng.integers(1, n + 1, batch).astype(np.int32)
  lengths[2] = 0  # a filler.
  mask = (np.arange(n) < lengths[:, None]).astype(np.float32)
  masked = lambda: (rng.normal(size=(batch, n)) * mask).astype(np.float32)
  return Rollout(
      tokens=rng.integers(0, 4, (batch, p + n)).astype(np.int32),
      segment_ids=np.ones((batch, p + n), np.int32),
      prompt_lengths=np.where(lengths > 0, 2, 0).astype(np.int32), lengths=lengths,
      hit_eos=(lengths > 0) & (rng.random(batch) < 0.6), mask=mask, rewards=masked(),
      policy_logp=masked(), sft_logp=masked(), ref_logp=masked(), entropy=masked(),
      decode_steps=np.int32(5),
  )


def test_metrics_equal_loops(rng):
  r = _rollout(rng)
  got = {k: float(v) for k, v in jax.jit(rollout_metrics)(r).items()}
  rows = [b for b in range(7) if r.lengths[b] > 0]
  tokens = [(b, t) for b in rows for t in range(r.lengths[b])]
  at_eos = [(b, r.lengths[b] - 1) for b in rows if r.hit_eos[b]]
  bigrams = [tuple(r.response_tokens[b, t - 1 : t + 1]) for b, t in tokens if t > 0]
  over = lambda x, where, n: sum(float(x[i]) for i in where) / max(n, 1)
  expected = {
      "reward": over(r.rewards, tokens, len(rows)),
      "reward_per_token": over(r.rewards, tokens, len(tokens)),
      "reward_eos": over(r.rewards, at_eos, len(at_eos)),
      "kl": over(r.policy_logp - r.sft_logp, tokens, len(rows)),
      "response_length": len(tokens) / len(rows),
      "eos_rate": len(at_eos) / len(rows),
      "entropy": over(r.entropy, tokens, len(tokens)),
      "decode_steps": 5,
      "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
      "sft_logp": over(r.sft_logp, tokens, len(tokens)),
      "ref_logp": over(r.ref_logp, tokens, len(tokens)),
  }
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    assert got[name] == pytest.approx(value, abs=1e-5), name


def test_distinct_bigrams_of_a_large_vocabulary(rng):
  tokens = rng.integers(0, 262_144, (20, 30)).astype(np.int32)
  tokens[10:] = tokens[:10]  # every bigram twice.
  lengths = np.tile(rng.integers(2, 31, 10), 2)
  mask = (np.arange(30) < lengths[:, None]).astype(np.float32)
  assert float(distinct_bigrams(tokens, mask)) == pytest.approx(0.5)
  assert float(distinct_bigrams(tokens[:10], mask[:10])) == pytest.approx(1.0)
