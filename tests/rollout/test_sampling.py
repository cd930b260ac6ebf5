"""Sampled tokens against naive filters and chi-square tests of frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.rollout import Sampling
from dpr_jax.rollout.sampling import ON_POLICY, filter_logits, sample_token


def _naive_filter(logits, temperature, top_k, top_p):
  """Allowed ids of one row, by sorting."""
  logits = logits.astype(np.float64) / temperature
  order = np.argsort(-logits)
  if top_k:
    order = order[:top_k]
  p = np.exp(logits[order] - logits[order].max())
  p /= p.sum()
  kept, mass = [], 0.0
  for i, q in zip(order, p):
    if mass >= top_p:
      break
    kept.append(i)
    mass += q
  return set(kept)


@pytest.mark.parametrize("temperature,top_k,top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 99, 1.0), (1.0, 0, 0.6),
    (1.3, 5, 0.5), (2.0, 0, 0.05),
])
def test_filters_keep_what_a_naive_filter_keeps(rng, temperature, top_k, top_p):
  logits = (2 * rng.normal(size=(20, 13))).astype(np.float32)
  got = np.asarray(filter_logits(jnp.asarray(logits), Sampling(temperature, top_k, top_p)))
  for row, ours in zip(logits, got):
    kept = _naive_filter(row, temperature, top_k, top_p)
    assert set(np.flatnonzero(np.isfinite(ours))) == kept
    i = sorted(kept)
    expected = (row[i] - row[i].max()) / temperature  # The largest is 0.
    np.testing.assert_allclose(ours[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(rng, temperature):
  """Also where the temperature is an argument of the program, and a device takes it for 0."""
  logits = (20 * rng.normal(size=(50, 13))).astype(np.float32)
  keys = jax.random.split(jax.random.key(2), 50)
  argument = jax.jit(lambda t: sample_token(logits, keys, ON_POLICY, t))(np.float32(temperature))
  for sampling in (Sampling(temperature), Sampling(temperature, top_k=3, top_p=0.9)):
    np.testing.assert_array_equal(sample_token(logits, keys, sampling), logits.argmax(axis=1))
  np.testing.assert_array_equal(argument, logits.argmax(axis=1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6), Sampling(top_k=3)],
                         ids=["plain", "cool", "top_k"])
def test_frequencies_follow_the_softmax(sampling):
  """Chi-square at fixed seeds; its 0.999 quantile at 5 degrees of freedom is 20.5."""
  logits = np.array([1.0, -0.5, 0.3, 0.0, -1.5, 0.8], np.float32)
  samples = 60_000
  keys = jax.random.split(jax.random.key(11), samples)
  tokens = sample_token(jnp.broadcast_to(logits, (samples, 6)), keys, sampling)
  count = np.bincount(np.asarray(tokens), minlength=6)
  p = np.exp(logits / sampling.temperature)
  if sampling.top_k:
    p[np.argsort(-logits)[3:]] = 0.0
  p = p / p.sum()
  np.testing.assert_array_equal(count[p == 0], 0)
  seen = p > 0
  assert np.sum((count[seen] - samples * p[seen]) ** 2 / (samples * p[seen])) < 20.5


def test_every_token_of_a_large_vocabulary_is_sampled_as_often_as_it_should(rng):
  """Chi-square over 700 tokens in 3 blocks, the last one not full; some have no probability."""
  logits = rng.normal(size=700).astype(np.float32)
  logits[rng.choice(700, 40, replace=False)] = -np.inf
  samples, p = 60_000, np.exp(logits.astype(np.float64))
  p /= p.sum()
  rows = jnp.broadcast_to(logits, (samples // 10, 700))
  sample_all = jax.jit(lambda keys: sample_token(rows, keys, Sampling()))
  count = np.zeros(700)
  for part in range(10):
    keys = jax.random.split(jax.random.key(part), samples // 10)
    count += np.bincount(np.asarray(sample_all(keys)), minlength=700)
  assert count[p == 0].sum() == 0 and (p == 0).sum() == 40
  seen = p > 0
  chi = np.sum((count[seen] - samples * p[seen]) ** 2 / (samples * p[seen]))
  assert chi < 659 + 5 * np.sqrt(2 * 659)  # 659 degrees of freedom, five standard deviations.


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(temperature=float("nan")),
                                 dict(temperature=float("inf")), dict(top_k=-1), dict(top_p=0.0),
                                 dict(top_p=1.5)])
def test_impossible_sampling_is_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    Sampling(**bad)
