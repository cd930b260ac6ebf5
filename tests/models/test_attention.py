"""Masks, positions and rotary embeddings equal loops over single queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import Rope
from dpr_jax.models import attention as attention_lib


def _segments(rng, batch, length):
  """Random rows with packed segments and with padding before, between and after them."""
  rows = []
  for _ in range(batch):
    row, segment = [], 0
    while len(row) < length:
      pad = rng.random() < 0.3
      segment += not pad
      row += [0 if pad else segment] * int(rng.integers(1, 5))
    rows.append(row[:length])
  return np.asarray(rows, np.int32)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_mask_equals_a_loop_over_queries_and_slots(rng, window):
  q_start = int(rng.integers(0, 4))
  kv = _segments(rng, 5, 12)
  q = kv[:, q_start : q_start + 7]
  mask = np.asarray(attention_lib.attention_mask(q, kv, q_start, window))[:, 0]
  expected = np.zeros((5, 7, 12), bool)
  for b, t, s in np.ndindex(expected.shape):
    slot = q_start + t
    between = np.count_nonzero(kv[b, s + 1 : slot + 1])  # tokens, without padding.
    expected[b, t, s] = (
        s <= slot and q[b, t] != 0 and kv[b, s] == q[b, t] and (not window or between < window)
    )
  np.testing.assert_array_equal(mask, expected)


def test_positions_count_from_zero_within_each_run(rng):
  segments = _segments(rng, 6, 15)
  expected = np.zeros_like(segments)
  for b in range(6):
    for t in range(1, 15):
      expected[b, t] = expected[b, t - 1] + 1 if segments[b, t] == segments[b, t - 1] else 0
  np.testing.assert_array_equal(attention_lib.positions_of(segments), expected)


def test_attend_equals_a_float64_softmax_with_shared_heads(rng):
  q, k, v = (
      rng.normal(size=s).astype(np.float32) for s in [(2, 5, 6, 4), (2, 7, 3, 4), (2, 7, 3, 4)]
  )
  mask = rng.random((2, 1, 5, 7)) < 0.6
  mask[..., 0] = True
  got = np.asarray(attention_lib.attend(q, k, v, mask, 0.37))
  expected = np.zeros_like(got, np.float64)
  for b, t, n in np.ndindex(2, 5, 6):
    score = 0.37 * k[b, :, n // 2].astype(np.float64) @ q[b, t, n]
    weight = np.where(mask[b, 0, t], np.exp(score - score.max()), 0.0)
    expected[b, t, n] = weight / weight.sum() @ v[b, :, n // 2]
  np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_over_the_cache_equals_that_over_a_row(rng, tokens):
  q = rng.normal(size=(3, tokens, 6, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 3, 11, 2, 8)).astype(np.float32)
  mask = rng.random((3, 1, tokens, 11)) < 0.6
  mask[..., 0] = True
  got = attention_lib.attend_cache(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, 0.37)
  np.testing.assert_allclose(got, attention_lib.attend(q, k, v, mask, 0.37), atol=2e-6)
  mask[1] = False
  got = attention_lib.attend_cache(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, 0.37)
  assert np.isfinite(got).all()


def test_attention_over_a_half_precision_cache_rounds_weights_and_output_alone(rng):
  """Scores, softmax and sums are float32: the error is that of two roundings to bfloat16."""
  q, k, v = (
      jnp.asarray(rng.normal(size=s), jnp.bfloat16)
      for s in [(3, 1, 6, 8), (3, 2, 40, 8), (3, 2, 40, 8)]
  )
  mask = rng.random((3, 1, 1, 40)) < 0.6
  mask[..., 0] = True
  got = attention_lib.attend_cache(q, k, v, mask, 0.37)
  assert got.dtype == jnp.bfloat16
  q, k, v, got = (np.asarray(x, np.float64) for x in (q, k, v, got))
  unit = 2.0**-8  # The largest relative error of a rounding to 8 significant bits.
  for b, n in np.ndindex(3, 6):
    score = 0.37 * k[b, n // 3] @ q[b, 0, n]
    weight = np.where(mask[b, 0, 0], np.exp(score - score.max()), 0.0)
    weight /= weight.sum()
    exact, size = weight @ v[b, n // 3], weight @ np.abs(v[b, n // 3])
    bound = unit * (size + np.abs(exact)) * 1.01 + 1e-6
    assert (np.abs(got[b, 0, n] - exact) <= bound).all()


def test_a_query_that_sees_nothing_gives_finite_values_and_gradients(rng):
  q, k, v = (rng.normal(size=(1, 3, 2, 4)).astype(np.float32) for _ in range(3))
  mask = np.zeros((1, 1, 3, 3), bool)
  value, grads = jax.value_and_grad(
      lambda *x: attention_lib.attend(*x, mask, 0.5).sum(), argnums=(0, 1, 2)
  )(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_rotation_keeps_norms_and_depends_on_distance_only(rng):
  rope = Rope(theta=100.0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def score(at_q, at_k):
    rotated = [
        attention_lib.rotate(
            x, *attention_lib.rope_tables(rope, 8, np.full((1, 1), p, np.int32))
        )
        for x, p in ((q, at_q), (k, at_k))
    ]
    np.testing.assert_allclose(np.linalg.norm(rotated[0]), np.linalg.norm(q), rtol=1e-6)
    return float(np.sum(np.asarray(rotated[0]) * np.asarray(rotated[1])))

  shift = int(rng.integers(1, 40))
  assert score(9, 4) == pytest.approx(score(9 + shift, 4 + shift), abs=2e-5)
  assert abs(score(9, 4) - score(9, 5)) > 1e-4


def test_frequencies_of_every_scaling():
  dim = 16
  plain = 500.0 ** (-np.arange(0, dim, 2) / dim)
  got = lambda **f: np.asarray(attention_lib.rope_frequencies(Rope(theta=500.0, **f), dim))
  np.testing.assert_allclose(got(), plain, rtol=1e-6)
  np.testing.assert_allclose(got(scaling="linear", factor=8.0), plain / 8, rtol=1e-6)
  llama3 = got(
      scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
      original_max_length=128,
  )
  for f, wavelength, scaled in zip(plain, 2 * np.pi / plain, llama3):
    if wavelength < 128 / 4:
      expected = f
    elif wavelength > 128:
      expected = f / 8
    else:
      smooth = (128 / wavelength - 1) / 3
      expected = (1 - smooth) * f / 8 + smooth * f
    assert scaled == pytest.approx(expected, rel=1e-5)
  with pytest.raises(ValueError, match="yarn"):
    got(scaling="yarn")
