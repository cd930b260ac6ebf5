"""Objectives, one a file: loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics).

Sums, not means: devices and micro-batches add sums and divide once. A metric is a sum,
or a pair (sum, weight) that is reported as their ratio. To write a new objective, copy
the file nearest to it.
"""

from dpr_jax.losses.reinforce import ReinforceBatch, make_reinforce_loss, reinforce_batch
from dpr_jax.losses.sft import make_sft_loss

__all__ = ["ReinforceBatch", "make_reinforce_loss", "make_sft_loss", "reinforce_batch"]
