"""Sampling and reward scoring, fused into one jitted program."""

from dpr_jax.rollout.sampler import Generation, generate
from dpr_jax.rollout.sampling import Sampling
from dpr_jax.rollout.step import Rollout, make_rollout_step
from dpr_jax.rollout.stop_strings import StopStrings, build_stop_strings

__all__ = [
    "Generation", "Rollout", "Sampling", "StopStrings", "build_stop_strings", "generate",
    "make_rollout_step",
]
