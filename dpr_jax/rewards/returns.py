"""Returns and advantages of masked token rewards, float32 [B, T]: undiscounted, critic-free.

Padding never leaks: values outside of the mask are ignored.
"""

import jax
import jax.numpy as jnp

from dpr_jax.rewards.shaping import standardized

RETURNS = ("reward_to_go", "full_return", "per_token")
VARIANCE_BASELINES = ("none", "position_mean", "leave_one_out", "whiten")


def reward_to_go(rewards: jax.Array, mask: jax.Array, gamma: float = 1.0) -> jax.Array:
  """G_t = sum_{k >= t} gamma^(k - t) m_k r_k, and 0 outside of the mask."""
  masked = jnp.where(mask > 0, rewards, 0.0).astype(jnp.float32)

  def step(future, reward):
    total = reward + gamma * future
    return total, total

  _, out = jax.lax.scan(step, jnp.zeros_like(masked[:, 0]), masked.T, reverse=True)
  return jnp.where(mask > 0, out.T, 0.0)


def full_return(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """G_t = sum_k m_k r_k at every token: sentence-level REINFORCE.

  The same expected gradient as reward-to-go at gamma = 1, with more variance.
  """
  total = jnp.sum(jnp.where(mask > 0, rewards, 0.0).astype(jnp.float32), axis=1, keepdims=True)
  return jnp.where(mask > 0, total, 0.0)


def per_token(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """G_t = r_t (gamma = 0): a different objective, whose optimum is contrastive decoding."""
  return jnp.where(mask > 0, rewards, 0.0).astype(jnp.float32)


def returns(rewards: jax.Array, mask: jax.Array, kind: str = "reward_to_go", gamma: float = 1.0):
  """The return named `kind`, one of RETURNS. ValueError for another name."""
  if kind == "reward_to_go":
    return reward_to_go(rewards, mask, gamma)
  if kind == "full_return":
    return full_return(rewards, mask)
  if kind == "per_token":
    return per_token(rewards, mask)
  raise ValueError(f"returns={kind!r} is not one of {RETURNS}")


def advantages(
    returns_BxT: jax.Array, mask_BxT: jax.Array, variance_baseline: str = "none",
    group_size: int = 1,
) -> jax.Array:
  """A_t = G_t - b_t, 0 outside of the mask.

  Args:
    variance_baseline: one of VARIANCE_BASELINES.
      none           b = 0.
      position_mean  mean return of the rows that still have a token at position t.
      leave_one_out  mean return at t of the *other* samples of the same prompt that still
                     have a token there; independent of the row's own actions, hence
                     unbiased. 0 where no other sample reaches t.
      whiten         (G - mean) / std over all response tokens of the batch.
    group_size: samples per prompt, in adjacent rows.

  Raises:
    ValueError: unknown variance_baseline, or leave_one_out with group_size < 2 or not dividing B.
  """
  g = jnp.where(mask_BxT > 0, returns_BxT, 0.0)
  if variance_baseline == "none":
    b = jnp.zeros_like(g)
  elif variance_baseline == "position_mean":
    count = jnp.sum(mask_BxT, axis=0, keepdims=True)
    b = jnp.broadcast_to(jnp.sum(g, axis=0, keepdims=True) / jnp.maximum(count, 1.0), g.shape)
  elif variance_baseline == "leave_one_out":
    batch, length = g.shape
    if group_size < 2 or batch % group_size:
      raise ValueError("leave_one_out needs at least 2 samples per prompt, dividing the batch: "
                       f"group_size={group_size}, batch={batch}")
    grouped = lambda x: x.reshape(batch // group_size, group_size, length)
    rest = lambda x: jnp.sum(x, axis=1, keepdims=True) - x
    others = lambda x: rest(grouped(x)).reshape(batch, length)
    b = others(g) / jnp.maximum(others(mask_BxT), 1.0)
  elif variance_baseline == "whiten":
    return jnp.where(mask_BxT > 0, standardized(g, mask_BxT), 0.0)
  else:
    raise ValueError(f"variance_baseline={variance_baseline!r} is not one of {VARIANCE_BASELINES}")
  return jnp.where(mask_BxT > 0, g - b, 0.0)
