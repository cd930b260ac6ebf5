"""What is added to a token reward: fractions and gradients survive, padding never comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.rewards import hybrid, kl_penalized

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [np.int32, np.float32, jnp.bfloat16])
def test_fractions_survive_whatever_the_dtype_of_the_rewards(make_arrays, dtype):
  policy, sft, mask = make_arrays(2)
  rewards = np.ones_like(mask).astype(dtype)
  got = kl_penalized(rewards, policy, sft, mask, beta=0.25)
  assert got.dtype == jnp.float32
  on = mask > 0
  np.testing.assert_allclose(np.asarray(got)[on], (1 - 0.25 * (policy - sft))[on], atol=1e-6)
  np.testing.assert_array_equal(np.asarray(got)[~on], 0.0)


def test_the_kl_in_the_reward_carries_no_gradient(make_arrays):
  policy, sft, mask = make_arrays(2)
  grad = jax.grad(lambda p: jnp.sum(kl_penalized(jnp.zeros_like(p), p, sft, mask, 1.0)))(policy)
  np.testing.assert_array_equal(grad, 0.0)


def test_hybrid_puts_the_external_score_on_the_last_token(make_arrays, rng):
  rewards, mask = make_arrays(1)
  mask[2] = 0.0  # a row that is masked away.
  external = rng.random(len(mask)).astype(np.float32)
  got = np.asarray(jax.jit(hybrid, static_argnums=3)(rewards, external, mask, 0.3))
  for b, t in np.ndindex(mask.shape):
    expected = 0.0
    if mask[b, t]:
      expected = 0.7 * rewards[b, t]
      if t == np.flatnonzero(mask[b])[-1]:
        expected += 0.3 * external[b]
    assert got[b, t] == pytest.approx(expected, abs=1e-5)
  alone = np.asarray(hybrid(rewards, external, mask, 1.0)).sum(1)
  np.testing.assert_allclose(alone, np.where(mask.any(1), external, 0.0), atol=1e-6)
