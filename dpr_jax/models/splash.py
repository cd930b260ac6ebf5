"""Splash attention on TPU: flash attention that skips the blocks excluded by a static mask.

The kernel is JAX's (`jax.experimental.pallas.ops.tpu.splash_attention`). It allocates no [T, T]
array, neither for scores nor for the mask: each block computes causality and window from slot
numbers and compares segments, and blocks that are fully masked are skipped.
"""

import jax
import jax.numpy as jnp

_LANES = 128  # of the vector unit; block sizes are multiples of it.


def block_size(length: int) -> int:
  """Returns the tokens per block for rows of `length`: as large as possible with little padding.

  Larger blocks need fewer steps, but a block must divide the padded row, and the blocks of all
  operands must fit into VMEM: 512 fits for a head_dim of 256 in float32 on v5e.
  """
  least = -(-length // _LANES) * _LANES
  for block in (512, 384, 256):
    if -(-length // block) * block <= least * 9 // 8:
      return block
  return _LANES


def splash_attention(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
    *,
    window: int,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
  """Causal grouped-query attention within segments, on one device.

  Args:
    segment_ids_BxT: int32. Padding (0) is treated as a segment: padding queries see padding, so
      that no softmax is empty, and no other query sees it.
    window: slots that a query sees, itself included; 0 means all.
    scale: multiplies q.k.
    interpret: interpret the kernel instead of compiling it, for tests without a TPU. Slow.

  Returns:
    [B, T, N, H] in the dtype of q; scores and softmax are float32.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads = q_BxTxNxH.shape[1:3]
  block = block_size(length)
  padded = -(-length // block) * block
  shape = (padded, padded)
  local = 0 < window < length
  mask = splash.LocalMask(shape, (window - 1, 0), 0) if local else splash.CausalMask(shape)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * heads),
      head_shards=1,
      q_seq_shards=1,
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
          block_q_dq=block, block_kv_dq=block,
      ),
      interpret=interpret,
  )

  def rows(x):  # Pads [B, T, ...] with zeros to whole blocks; segment id 0 is padding.
    return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

  heads_first = lambda x: rows(x).swapaxes(1, 2)
  # The kernel has no scale argument. In half precision this rounds q once more, unless the scale
  # is a power of two (head_dim 64 or 256).
  q_BxTxNxH = (q_BxTxNxH.astype(jnp.float32) * scale).astype(q_BxTxNxH.dtype)
  segments_BxT = rows(segment_ids_BxT)
  out_BxNxTxH = jax.vmap(kernel)(
      heads_first(q_BxTxNxH),
      heads_first(k_BxTxKxH),
      heads_first(v_BxTxKxH),
      splash.SegmentIds(q=segments_BxT, kv=segments_BxT),
  )
  return out_BxNxTxH.swapaxes(1, 2)[:, :length]
