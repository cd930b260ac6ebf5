"""Reward transforms: small functions (rewards, mask) -> rewards, applied in a stated order.

They trade fidelity to the log-ratio for robustness: one token with a reward of -12 can
otherwise outweigh a whole batch. All give 0 where the mask is 0, whatever stands there.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Transform = Callable[[jax.Array, jax.Array], jax.Array]


def scale(factor: float) -> Transform:
  """Multiplies every reward."""
  return lambda rewards, mask: jnp.where(mask > 0, rewards * factor, 0.0)


def clip(low: float, high: float) -> Transform:
  """Clips each token's reward to [low, high] nats."""
  return lambda rewards, mask: jnp.where(mask > 0, jnp.clip(rewards, low, high), 0.0)


def zscore_by_position(epsilon: float = 1e-6) -> Transform:
  """(r - mean) / std over the rows that have a token at that position of the response.

  Removes what is common to a position, a pressure on length included. A position with
  one row becomes 0.
  """

  def apply(rewards, mask):
    rewards = jnp.where(mask > 0, rewards, 0.0)
    count = jnp.maximum(jnp.sum(mask, axis=0, keepdims=True), 1.0)
    mean = jnp.sum(rewards, axis=0, keepdims=True) / count
    variance = jnp.sum(jnp.square(rewards - mean) * mask, axis=0, keepdims=True) / count
    return jnp.where(mask > 0, (rewards - mean) * jax.lax.rsqrt(variance + epsilon), 0.0)

  return apply


def compose(transforms: Sequence[Transform]) -> Transform:
  """Applies transforms from first to last; none at all is the identity."""

  def apply(rewards, mask):
    rewards = jnp.where(mask > 0, rewards, 0.0).astype(jnp.float32)
    for transform in transforms:
      rewards = transform(rewards, mask)
    return rewards

  return apply
