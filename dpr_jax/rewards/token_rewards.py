"""Token rewards recovered from a supervised model. Pure functions of [B, T] arrays.

Arrays are float32 and aligned with the token they judge; `mask` is 1 on response tokens
(EOS included) and 0 elsewhere, and every reward is 0 where it is 0.
Source: arXiv 2510.02493; the notation is that of IQ-Learn (arXiv 2106.12142) with logits as Q.
"""

import jax
import jax.numpy as jnp


def baseline_relative(logp_sft: jax.Array, logp_ref: jax.Array, mask: jax.Array) -> jax.Array:
  """r(t) = log pi_sft(y_t | s_t) - log pi_ref(y_t | s_t), nats. The paper's reward.

  It sums to the sequence log-ratio, and does not change when a function of the state is
  added to either model's logits.
  """
  return jnp.where(mask > 0, logp_sft - logp_ref, 0.0).astype(jnp.float32)


def log_likelihood(logp_sft: jax.Array, mask: jax.Array) -> jax.Array:
  """r(t) = log pi_sft(y_t | s_t): the ablation without a reference."""
  return jnp.where(mask > 0, logp_sft, 0.0).astype(jnp.float32)


def endogenous(logp_sft: jax.Array, logsumexp_sft: jax.Array, mask: jax.Array) -> jax.Array:
  """r(t) = Q(s_t, y_t) - V(s_{t+1}) with Q the logits and V their logsumexp; V(terminal) = 0.

  Equals log pi_sft(y_t | s_t) + V(s_t) - V(s_{t+1}). Per token it depends on the gauge of
  the logits (a constant added in one state moves reward between neighbours).

  Args:
    logsumexp_sft: V(s_t) of the state in which token t is chosen, [B, T]. The response must
      be contiguous in its row.
  """
  value = jnp.where(mask > 0, logsumexp_sft, 0.0)
  next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
  return jnp.where(mask > 0, logp_sft + value - next_value, 0.0).astype(jnp.float32)


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


def kl_penalised(
    rewards: jax.Array,
    logp_policy: jax.Array,
    logp_sft: jax.Array,
    mask: jax.Array,
    beta: float | jax.Array,
    logp_ref: jax.Array | None = None,
    beta_ref: float = 0.0,
) -> jax.Array:
  """r~(t) = r(t) - beta (log pi_policy - log pi_sft), the KL to SFT inside the reward ("k1").

  With `logp_ref` also - beta_ref (log pi_policy - log pi_ref): a dual KL, which holds the
  policy near ref as well and weakens the extrapolation away from it. A constant for the
  gradient: returns of it weigh the score function.
  """
  logp_policy = jax.lax.stop_gradient(logp_policy)
  penalty = beta * (logp_policy - logp_sft)
  if logp_ref is not None:
    penalty = penalty + beta_ref * (logp_policy - logp_ref)
  return jnp.where(mask > 0, rewards.astype(jnp.float32) - penalty, 0.0)
