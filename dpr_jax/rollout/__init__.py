"""Sampling and reward scoring, fused into one jitted program."""

from dpr_jax.rollout.sampler import Generation, generate
from dpr_jax.rollout.sampling import Sampling
from dpr_jax.rollout.step import Rollout, make_rollout_step

__all__ = ["Generation", "Rollout", "Sampling", "generate", "make_rollout_step"]
