"""Token rewards, transforms, returns and advantages: pure functions of [B, T] arrays."""

from dpr_jax.rewards.returns import advantages, returns
from dpr_jax.rewards.token_rewards import (
    baseline_relative,
    endogenous,
    hybrid,
    kl_penalised,
    log_likelihood,
)

__all__ = [
    "advantages",
    "baseline_relative",
    "endogenous",
    "hybrid",
    "kl_penalised",
    "log_likelihood",
    "returns",
]
