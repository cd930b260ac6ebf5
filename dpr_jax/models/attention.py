"""Attention over packed rows or a cache, and rotary embeddings.

Masks are made of slots and segments, never of token ids: slot t may see slot s iff
s <= t, both belong to the same segment, that segment is not 0 (padding), and, in a
local layer, fewer than `window` tokens lie from s to t. Padding slots do not count, so
that a window over slots is a window over positions wherever the padding is.
"""

import jax
import jax.numpy as jnp

from dpr_jax.models.config import Rope


def positions_of(segment_ids_BxT: jax.Array) -> jax.Array:
  """Positions counted from 0 within each run of equal segment ids. int32 [B, T]."""
  index_1xT = jnp.arange(segment_ids_BxT.shape[1], dtype=jnp.int32)[None, :]
  starts_BxT = jnp.concatenate(
      [
          jnp.ones_like(segment_ids_BxT[:, :1], dtype=bool),
          segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1],
      ],
      axis=1,
  )
  index_BxT = jnp.broadcast_to(index_1xT, segment_ids_BxT.shape)
  first_BxT = jax.lax.cummax(jnp.where(starts_BxT, index_BxT, 0), axis=1)
  return index_BxT - first_BxT


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
  """Angular frequencies, float32 [head_dim / 2], radians a token.

  The llama3 rule follows Llama 3.1's published description (and transformers'
  `_compute_llama3_parameters`): long wavelengths are divided by `factor`, short
  ones kept, those between interpolated.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = 1.0 / (rope.theta**exponent)
  if rope.scaling == "none":
    return frequency
  if rope.scaling == "linear":
    return frequency / rope.factor
  if rope.scaling != "llama3":
    raise ValueError(f"rope scaling {rope.scaling!r} is not one of none, linear, llama3")
  wavelength = 2 * jnp.pi / frequency
  low, high = rope.low_freq_factor, rope.high_freq_factor
  smooth = (rope.original_max_length / wavelength - low) / (high - low)
  smooth = jnp.clip(smooth, 0.0, 1.0)
  return (1 - smooth) * frequency / rope.factor + smooth * frequency


def rope_tables(rope: Rope, head_dim: int, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32 [B, T, 1, head_dim / 2], to be used by `rotate`."""
  frequencies_1x1xF = rope_frequencies(rope, head_dim)[None, None, :]
  angle = positions_BxT[:, :, None].astype(jnp.float32) * frequencies_1x1xF
  return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotate(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of each head against each other (the half-split convention)."""
  a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxH.dtype)


def attention_mask(
    q_segments_BxT: jax.Array, kv_segments_BxS: jax.Array, q_start: jax.Array | int, window: int = 0
) -> jax.Array:
  """Which slots each query sees, bool [B, 1, T, S]; query t sits in slot q_start + t."""
  q_slot_Tx1 = q_start + jnp.arange(q_segments_BxT.shape[1], dtype=jnp.int32)[:, None]
  kv_slot_1xS = jnp.arange(kv_segments_BxS.shape[1], dtype=jnp.int32)[None, :]
  seen_BxTxS = q_segments_BxT[:, :, None] == kv_segments_BxS[:, None, :]
  seen_BxTxS &= (q_segments_BxT != 0)[:, :, None] & (kv_slot_1xS <= q_slot_Tx1)[None, :, :]
  if window:
    # Counted in tokens, not in slots: padding may lie between a prompt and what follows it.
    rank_BxS = jnp.cumsum(kv_segments_BxS != 0, axis=1, dtype=jnp.int32)
    q_rank_BxT = jax.lax.dynamic_slice_in_dim(rank_BxS, q_start, q_segments_BxT.shape[1], axis=1)
    seen_BxTxS &= q_rank_BxT[:, :, None] - rank_BxS[:, None, :] < window
  return seen_BxTxS[:, None, :, :]


def attend(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_Bx1xTxS, scale: float) -> jax.Array:
  """Grouped-query attention; softmax in float32. Rows that see nothing give finite garbage."""
  return jax.nn.dot_product_attention(
      q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask=mask_Bx1xTxS, scale=scale
  )
