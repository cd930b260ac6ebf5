"""What is added to a token reward: a verifier's score, and the KL to other policies.

Arrays are float32 [B, T], aligned with the token they judge; `mask` is 1 on response tokens (EOS
included), and everything is 0 where it is 0.
"""

import jax
import jax.numpy as jnp


def standardized(
    x: jax.Array, mask: jax.Array, axis: int | None = None, epsilon: float = 1e-8
) -> jax.Array:
  """(x - mean) / std of the masked values along `axis` (None: all); not masked itself.

  Values that are equal but for float32 rounding become 0, where a division would blow the rounding
  up to the size of a signal.
  """
  x = jnp.where(mask > 0, x, 0.0)
  count = jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1.0)
  mean = jnp.sum(x, axis=axis, keepdims=True) / count
  variance = jnp.sum(jnp.square(x - mean) * mask, axis=axis, keepdims=True) / count
  # By the range, because the rounding of a long sum would pass for a variance.
  high = jnp.max(jnp.where(mask > 0, x, -jnp.inf), axis=axis, keepdims=True)
  low = jnp.min(jnp.where(mask > 0, x, jnp.inf), axis=axis, keepdims=True)
  equal = high - low <= 1e-5 * jnp.maximum(jnp.abs(high), jnp.abs(low))
  return jnp.where(equal, 0.0, (x - mean) * jax.lax.rsqrt(variance + epsilon))


def hybrid(
    rewards: jax.Array, external_B: jax.Array, mask: jax.Array, weight: float
) -> jax.Array:
  """(1 - w) r(t) + w r_external on the last token of the response; (1 - w) r(t) before it.

  Args:
    external_B: float32 [B], a score of the whole response, such as a verifier's in [0, 1].
    weight: w in [0, 1], reward nats per unit of score beside the nats of r.
  """
  column = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
  last = column == jnp.max(jnp.where(mask > 0, column, -1), axis=1, keepdims=True)
  mixed = (1.0 - weight) * rewards + jnp.where(last, weight * external_B[:, None], 0.0)
  return jnp.where(mask > 0, mixed, 0.0).astype(jnp.float32)


def kl_penalized(
    rewards: jax.Array, logp_policy: jax.Array, logp_sft: jax.Array, mask: jax.Array,
    beta: float | jax.Array, logp_ref: jax.Array | None = None, beta_ref: float = 0.0,
) -> jax.Array:
  """r~(t) = r(t) - beta (log pi_policy - log pi_sft), the KL to SFT inside the reward ("k1").

  With `logp_ref` also - beta_ref (log pi_policy - log pi_ref): a dual KL, which holds the
  policy near ref as well and weakens the extrapolation away from it. A constant for the
  gradient: returns of it multiply the score function.
  """
  logp_policy = jax.lax.stop_gradient(logp_policy)
  penalty = beta * (logp_policy - logp_sft)
  if logp_ref is not None:
    penalty = penalty + beta_ref * (logp_policy - logp_ref)
  return jnp.where(mask > 0, rewards.astype(jnp.float32) - penalty, 0.0)
