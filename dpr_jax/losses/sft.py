"""Supervised fine-tuning: the mean negative log-likelihood of response tokens.

Also the IQ-Learn objective at gamma = 1 with logits as Q, by telescoping.
"""

import jax.numpy as jnp

from dpr_jax.data.batches import SFTBatch
from dpr_jax.models.logprobs import token_logprobs


def make_sft_loss(model):
  """Returns loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics).

  loss_sum: nats summed over trained tokens, each times its entry of the loss mask; weight: the sum
  of those entries, the number of trained tokens where all are 1. The mean is taken once, over all
  devices and micro-batches, by the train step.
  """

  def loss_fn(variables, batch: SFTBatch, rng):
    rngs = None if rng is None else {"dropout": rng}
    out = token_logprobs(model, variables, batch.tokens, batch.segment_ids, rngs=rngs)
    loss_sum = -jnp.sum(out.logp * batch.loss_mask)
    weight = jnp.sum(batch.loss_mask)
    return loss_sum, weight, {"tokens": jnp.sum((batch.loss_mask > 0).astype(jnp.float32))}

  return loss_fn
