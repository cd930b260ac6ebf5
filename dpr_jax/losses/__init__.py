"""Objectives that methods share: loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics).

Sums, not means: devices and micro-batches add sums and divide once. A metric is a sum,
or a pair (sum, weight) that is reported as their ratio. An objective of one method is in its file
(`methods/dft.py`); to write a new one, copy the nearest.
"""

from dpr_jax.losses.full_vocabulary import (
    FullVocabularyBatch,
    full_vocabulary_batch,
    make_full_vocabulary_loss,
)
from dpr_jax.losses.pairs import PairBatch, generated_rows, make_pair_batch
from dpr_jax.losses.reinforce import ReinforceBatch, make_reinforce_loss, reinforce_batch
from dpr_jax.losses.sft import make_sft_loss

__all__ = [
    "FullVocabularyBatch", "PairBatch", "ReinforceBatch", "full_vocabulary_batch", "generated_rows",
    "make_full_vocabulary_loss", "make_pair_batch", "make_reinforce_loss", "make_sft_loss",
    "reinforce_batch",
]
