"""Pairs of a demonstration and a response sampled for its prompt: what SPIN and GSIL compare.

Both losses are functions of two log-ratios per pair, log pi(y) - log pi_k(y) of the demonstration y
and of the sample y' ~ pi_k, summed over response tokens. pi_k is the previous iterate, frozen.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import SFTBatch
from dpr_jax.models.logprobs import token_logprobs


@struct.dataclass
class PairBatch:
  """Row b of `demos` and of `generated` answer the same prompt. One response per row, not packed.

  The two may differ in their number of columns. A row without a trained token on either side
  is a filler: it has no weight.
  """

  demos: SFTBatch  # tokens, segment_ids int32 [B, T] and loss_mask float32 [B, T] of y.
  generated: SFTBatch  # the same of y', [B, T'].
  demo_logp: Any  # float32 [B], log pi_k(y), nats summed over the trained tokens.
  generated_logp: Any  # float32 [B], log pi_k(y').


def summed_logp(model, variables, rows: SFTBatch, *, rngs=None) -> jax.Array:
  """float32 [B], log pi of each row's trained tokens, summed, nats."""
  out = token_logprobs(model, variables, rows.tokens, rows.segment_ids, rngs=rngs)
  return jnp.sum(jnp.where(rows.loss_mask > 0, out.logp, 0.0), axis=1)


def make_pair_batch(model, frozen, demos: SFTBatch, generated: SFTBatch) -> PairBatch:
  """The batch of an iteration, with the log-probs of its frozen model computed once. Jittable.

  Args:
    frozen: variables of pi_k, the model that `generated` was sampled from.
    demos, generated: unpacked rows of the same prompts, in the same order.

  Raises:
    ValueError: different numbers of rows.
  """
  if demos.tokens.shape[0] != generated.tokens.shape[0]:
    raise ValueError(f"{demos.tokens.shape[0]} demonstrations and {generated.tokens.shape[0]} "
                     "generated rows make no pairs")
  score = lambda rows: jax.lax.stop_gradient(summed_logp(model, frozen, rows))
  return PairBatch(
      demos=demos, generated=generated, demo_logp=score(demos), generated_logp=score(generated)
  )


def generated_rows(rollout) -> SFTBatch:
  """The responses of a `rollout.Rollout` as rows: the mask gets its prompt columns, of 0."""
  prompt_columns = rollout.tokens.shape[1] - rollout.mask.shape[1]
  return SFTBatch(
      tokens=rollout.tokens,
      segment_ids=rollout.segment_ids,
      loss_mask=jnp.pad(rollout.mask, ((0, 0), (prompt_columns, 0))),
  )


def log_ratios(
    model, variables, batch: PairBatch, rng
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(demo, generated, on), float32 [B] each: log pi - log pi_k of both rows; 0 off the pairs.

  `on` is 1 on pairs and 0 on fillers.
  """
  # One key for both sides: a dropout mask that differs would be a difference between them.
  rngs = None if rng is None else {"dropout": rng}
  on_B = jnp.any(batch.demos.loss_mask > 0, axis=1) & jnp.any(
      batch.generated.loss_mask > 0, axis=1
  )

  def log_ratio(rows, frozen_B):
    logp_B = summed_logp(model, variables, rows, rngs=rngs)
    return jnp.where(on_B, logp_B - jax.lax.stop_gradient(frozen_B), 0.0)

  demo_B = log_ratio(batch.demos, batch.demo_logp)
  generated_B = log_ratio(batch.generated, batch.generated_logp)
  return demo_B, generated_B, on_B.astype(jnp.float32)


def pair_metrics(
    demo_B: jax.Array, generated_B: jax.Array, on_B: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array] | jax.Array]:
  """pairs; and as means over them, both log-ratios (nats) and how often the demo's is larger."""
  pairs = jnp.sum(on_B)
  return {
      "pairs": pairs,
      "demo_log_ratio": (jnp.sum(demo_B), pairs),
      "generated_log_ratio": (jnp.sum(generated_B), pairs),
      "pair_accuracy": (jnp.sum(on_B * (demo_B > generated_B)), pairs),
  }
