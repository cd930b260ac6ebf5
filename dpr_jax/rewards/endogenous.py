"""The reward that the logits of one model imply."""

import dataclasses

import jax.numpy as jnp

from dpr_jax.rewards.base import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endogenous(Reward):
  """r(t) = Q(s_t, y_t) - V(s_{t+1}) with Q the logits and V their logsumexp; V(terminal) = 0.

  Equals log pi_sft(y_t | s_t) + V(s_t) - V(s_{t+1}). Per token it depends on the gauge of the
  logits (a constant added in one state moves reward between neighbours). The response must be
  contiguous in its row. Source: IQ-Learn, arXiv 2106.12142, with logits as Q; arXiv 2506.23235.
  """

  kind = "endogenous"
  title = "endogenous"
  per_token = False

  def __call__(self, sft_logp, sft_logsumexp, mask):
    value = jnp.where(mask > 0, sft_logsumexp, 0.0)
    next_value = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], axis=1)
    return sft_logp + value - next_value
