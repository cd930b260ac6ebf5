"""The paper's reward: what SFT learned after the reference."""

import dataclasses

from dpr_jax.rewards.base import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineRelative(Reward):
  """r(t) = log pi_sft(y_t | s_t) - log pi_ref(y_t | s_t), nats.

  It sums to the log-ratio of the response, and does not change when a function of the state is
  added to the logits of either model. Source: arXiv 2510.02493.
  """

  kind = "baseline_relative"
  title = "log π_sft − log π_ref"
  pointwise = True

  def __call__(self, sft_logp, ref_logp):
    return sft_logp - ref_logp


BASELINE_RELATIVE = BaselineRelative()
