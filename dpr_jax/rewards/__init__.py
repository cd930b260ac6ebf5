"""Token rewards, one per file; transforms, returns, advantages: pure functions of [B, T] arrays."""

from dpr_jax.rewards.base import Reward, RewardFn, Scores, apply_reward, needs
from dpr_jax.rewards.baseline_relative import BaselineRelative
from dpr_jax.rewards.endogenous import Endogenous
from dpr_jax.rewards.log_likelihood import LogLikelihood
from dpr_jax.rewards.returns import advantages, returns
from dpr_jax.rewards.shaping import hybrid, kl_penalized

__all__ = [
    "BaselineRelative", "Endogenous", "LogLikelihood", "Reward", "RewardFn", "Scores", "advantages",
    "apply_reward", "hybrid", "kl_penalized", "needs", "returns",
]
