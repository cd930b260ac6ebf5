"""Drawing a token from logits: temperature, top-k, top-p, and one number of noise a row.

Dims: B rows, V vocabulary in P parts of S tokens, M blocks of C tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dpr_jax.sharding import vocab_ways


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. The default is the policy itself; anything else is off-policy."""

  temperature: float = 1.0  # 0 is greedy.
  top_k: int = 0  # keep the k likeliest; 0 keeps all.
  top_p: float = 1.0  # then keep the smallest set with this probability.

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f"{self}: temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed")


ON_POLICY = Sampling()


def filter_logits(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
  """Logits after temperature, top-k and top-p; -inf where a token is not allowed."""
  logits_BxV = logits_BxV / sampling.temperature
  if sampling.top_k:
    k = min(sampling.top_k, logits_BxV.shape[-1])
    least = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV < least, -jnp.inf, logits_BxV)
  if sampling.top_p < 1:
    sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
    probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
    before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV  # mass of likelier tokens.
    kept_BxV = jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf)
    logits_BxV = jnp.where(
        logits_BxV < jnp.min(kept_BxV, axis=-1, keepdims=True), -jnp.inf, logits_BxV
    )
  return logits_BxV


_BLOCK = 256  # tokens whose probabilities are summed before one of them is chosen.


def draw(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
  """One token a row, int32 [B], each with a key of its own.

  By inverting the distribution function in two levels: one uniform number a row picks a block of
  the vocabulary, and what is left of it a token. Gumbel noise would need a random number and two
  logarithms for every token of the vocabulary. Probabilities below 1e-7 are at the resolution of
  float32, there as here; a token of probability 0 is never drawn.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  logits_BxV = filter_logits(logits_BxV, sampling)
  p_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
  rows, vocab = p_BxV.shape
  # Blocks lie within the parts of a vocabulary that is split over devices: only their sums move.
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
  # Rounding may put the target at the very end, behind all that has a probability.
  last_Bx1 = jnp.max(jnp.where(mass_BxM > 0, index_1xM, 0), axis=-1, keepdims=True)
  block_Bx1 = jnp.minimum(block_Bx1, last_Bx1)
  # Sums over a mask, not gathers: they stay local where the vocabulary is split.
  before_Bx1 = jnp.max(jnp.where(index_1xM < block_Bx1, upto_BxM, 0.0), axis=-1, keepdims=True)
  inside_BxC = jnp.sum(jnp.where((index_1xM == block_Bx1)[:, :, None], p_BxMxC, 0.0), axis=1)
  found_B = jnp.sum(
      jnp.cumsum(inside_BxC, axis=-1) <= target_Bx1 - before_Bx1, axis=-1, dtype=jnp.int32
  )
  index_1xC = jnp.arange(_BLOCK, dtype=jnp.int32)[None, :]
  last_B = jnp.max(jnp.where(inside_BxC > 0, index_1xC, 0), axis=-1)
  part_B, within_B = jnp.divmod(block_Bx1[:, 0], per_part)
  return part_B * size + within_B * _BLOCK + jnp.minimum(found_B, last_B)
