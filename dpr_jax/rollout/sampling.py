"""Sampling a token from logits: temperature, top-k, top-p, and one random number per row.

Dims: B rows, V vocabulary in P parts of S tokens each, M blocks of C tokens each.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dpr_jax.sharding import vocab_ways


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is sampled. The default is the policy itself; anything else is off-policy."""

  temperature: float = 1.0  # 0 is greedy decoding.
  top_k: int = 0  # Only the k most likely tokens are allowed; 0 allows all.
  top_p: float = 1.0  # Of those, only the smallest set that has this much probability.

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f"{self}: finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed")


ON_POLICY = Sampling()


def filter_logits(
    logits_BxV: jax.Array, sampling: Sampling, temperature: jax.Array | None = None
) -> jax.Array:
  """Returns the logits after temperature, top-k and top-p; -inf marks a forbidden token.

  The largest one is 0: divided by a tiny temperature it stays the largest, not one of many
  infinities.

  Args:
    temperature: float32 scalar in place of that of `sampling`; it may be traced.
  """
  temperature = jnp.float32(sampling.temperature) if temperature is None else temperature
  logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
  logits_BxV = logits_BxV / jnp.maximum(temperature, _COLDEST)
  if sampling.top_k:
    k = min(sampling.top_k, logits_BxV.shape[-1])
    least = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV < least, -jnp.inf, logits_BxV)
  if sampling.top_p < 1:
    sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV  # Mass of more likely tokens.
    kept_BxV = jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf)
    logits_BxV = jnp.where(
        logits_BxV < jnp.min(kept_BxV, axis=-1, keepdims=True), -jnp.inf, logits_BxV
    )
  return logits_BxV


_COLDEST = 1e-30  # Devices take what is much smaller for 0.
_BLOCK = 256  # Tokens per block of the two-level search.


def sample_token(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling,
    temperature: jax.Array | None = None,
) -> jax.Array:
  """Samples one token per row, int32 [B]; every row has a random key of its own.

  The cumulative distribution is inverted in two levels. A single uniform number per row selects a
  block of the vocabulary, and its remainder selects a token within that block. Gumbel noise would
  take a random number and two logarithms for every token of the vocabulary. With either method,
  probabilities below 1e-7 are lost in the resolution of float32. A token of probability 0 is never
  sampled.

  Args:
    temperature: see `filter_logits`; greedy decoding has none.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  p_BxV = jnp.exp(filter_logits(logits_BxV, sampling, temperature))
  rows, vocab = p_BxV.shape
  # No block crosses a device boundary of a split vocabulary, so only block sums are communicated.
  parts = vocab_ways(vocab)
  size = vocab // parts
  per_part = -(-size // _BLOCK)
  p_BxPxS = p_BxV.reshape(rows, parts, size)
  p_BxPxS = jnp.pad(p_BxPxS, ((0, 0), (0, 0), (0, per_part * _BLOCK - size)))
  blocks = parts * per_part
  p_BxMxC = p_BxPxS.reshape(rows, blocks, _BLOCK)
  mass_BxM = jnp.sum(p_BxMxC, axis=-1)
  upto_BxM = jnp.cumsum(mass_BxM, axis=-1)
  target_Bx1 = jax.vmap(jax.random.uniform)(keys_B)[:, None] * upto_BxM[:, -1:]
  block_Bx1 = jnp.sum(upto_BxM <= target_Bx1, axis=-1, keepdims=True, dtype=jnp.int32)
  index_1xM = jnp.arange(blocks, dtype=jnp.int32)[None, :]
  # Rounding can push the target past the last block that has any probability.
  last_Bx1 = jnp.max(jnp.where(mass_BxM > 0, index_1xM, 0), axis=-1, keepdims=True)
  block_Bx1 = jnp.minimum(block_Bx1, last_Bx1)
  # Masked sums stay local where the vocabulary is split; gathers would not.
  before_Bx1 = jnp.max(jnp.where(index_1xM < block_Bx1, upto_BxM, 0.0), axis=-1, keepdims=True)
  inside_BxC = jnp.sum(jnp.where((index_1xM == block_Bx1)[:, :, None], p_BxMxC, 0.0), axis=1)
  found_B = jnp.sum(
      jnp.cumsum(inside_BxC, axis=-1) <= target_Bx1 - before_Bx1, axis=-1, dtype=jnp.int32
  )
  index_1xC = jnp.arange(_BLOCK, dtype=jnp.int32)[None, :]
  last_B = jnp.max(jnp.where(inside_BxC > 0, index_1xC, 0), axis=-1)
  part_B, within_B = jnp.divmod(block_Bx1[:, 0], per_part)
  return part_B * size + within_B * _BLOCK + jnp.minimum(found_B, last_B)
