"""The ablation without a reference."""

import dataclasses

from dpr_jax.rewards.base import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLikelihood(Reward):
  """r(t) = log pi_sft(y_t | s_t), nats."""

  kind = "log_likelihood"
  title = "log π_sft"
  pointwise = True

  def __call__(self, sft_logp):
    return sft_logp
