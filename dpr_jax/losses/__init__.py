"""Objectives, one per file: loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics).

Sums, not means: devices and micro-batches add sums and divide once. A metric is a sum,
or a pair (sum, weight) that is reported as their ratio. To write a new objective, copy
the file nearest to it.
"""

from dpr_jax.losses.dft import make_dft_loss
from dpr_jax.losses.gsil import make_gsil_loss
from dpr_jax.losses.iq_lm import make_iq_lm_loss
from dpr_jax.losses.pairs import PairBatch, generated_rows, make_pair_batch
from dpr_jax.losses.reinforce import ReinforceBatch, make_reinforce_loss, reinforce_batch
from dpr_jax.losses.sft import make_sft_loss
from dpr_jax.losses.spin import make_spin_loss

__all__ = [
    "PairBatch",
    "ReinforceBatch",
    "generated_rows",
    "make_dft_loss",
    "make_gsil_loss",
    "make_iq_lm_loss",
    "make_pair_batch",
    "make_reinforce_loss",
    "make_sft_loss",
    "make_spin_loss",
    "reinforce_batch",
]
