"""Attention over packed rows or a cache, and rotary embeddings.

Masks are made of slots and segments, never of token ids: slot t may see slot s iff
s <= t, both belong to the same segment, that segment is not 0 (padding), and, in a
local layer, fewer than `window` tokens lie from s to t. Padding slots do not count, so
that a window over slots is a window over positions wherever the padding is.

Whole rows without a cache go through `self_attention`, which has a kernel for each
platform; `attend` is what XLA makes of the formula, and the reference of the others.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dpr_jax.errors import UserError
from dpr_jax.models import splash
from dpr_jax.models.config import ModelConfig, Rope
from dpr_jax.sharding import resolve


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


def attend_cache(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, mask_Bx1xTxS, scale: float) -> jax.Array:
  """`attend` over keys and values that have their heads first, as the cache keeps them."""
  B, T, N, H = q_BxTxNxH.shape
  _, K, S, _ = k_BxKxSxH.shape
  # Not by einsum, which is free to put the cache on the left, and then the CPU copies it.
  heads = ((0, 1), (0, 1))
  product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  q_BxKxTxGxH = jnp.moveaxis(q_BxTxNxH.reshape(B, T, K, N // K, H), 2, 1)
  score_BxKxTxGxS = scale * product(q_BxKxTxGxH, k_BxKxSxH, (((4,), (3,)), heads))
  unseen = 0.5 * jnp.finfo(jnp.float32).min  # Finite: a query may see nothing.
  score_BxKxTxGxS = jnp.where(mask_Bx1xTxS[:, :, :, None], score_BxKxTxGxS, unseen)
  weight_BxKxTxGxS = jax.nn.softmax(score_BxKxTxGxS, axis=-1).astype(v_BxKxSxH.dtype)
  out_BxKxTxGxH = product(weight_BxKxTxGxS, v_BxKxSxH, (((4,), (2,)), heads))
  return jnp.moveaxis(out_BxKxTxGxH, 1, 2).reshape(B, T, N, H).astype(q_BxTxNxH.dtype)


def target_platform() -> str:
  """cpu, gpu or tpu: of the mesh if one is set, else of the default backend.

  A mesh over described devices (ahead-of-time compilation) has a platform that this machine
  need not have.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return jax.default_backend() if device is None else device.platform


def resolve_backend(cfg: ModelConfig, length: int) -> str:
  """xla, cudnn or splash: what computes attention over rows of `length` tokens, now and here.

  `cfg.attention` where it names one; auto takes the kernel of the platform wherever it accepts
  dtype and shapes, and XLA elsewhere.

  Raises:
    UserError: the backend named does not exist on this platform or does not take this model.
  """
  platform, dtype = target_platform(), jnp.dtype(cfg.dtype)
  refused = ""
  if cfg.attention == "cudnn" or (cfg.attention == "auto" and platform == "gpu"):
    # auto takes what every GPU since Ampere has, forward and backward; 256 needs a Hopper.
    widest = 128 if cfg.attention == "auto" else 256
    if platform != "gpu":
      refused = f"needs a GPU, and this is a {platform.upper()}"
    elif dtype not in (jnp.bfloat16, jnp.float16):
      refused = f"needs config.model.dtype=bfloat16, not {dtype}"
    elif cfg.head_dim > widest or cfg.head_dim % 8:
      refused = f"needs a head_dim of at most {widest}, a multiple of 8, not {cfg.head_dim}"
    backend = "cudnn"
  elif cfg.attention == "splash" or (cfg.attention == "auto" and platform == "tpu"):
    if platform == "gpu":
      refused = "needs a TPU, and this is a GPU"
    elif cfg.attention == "auto" and length < 128:
      refused = "pads rows to 128 tokens"
    backend = "splash"
  else:
    backend = "xla"
  if not refused:
    return backend
  if cfg.attention == "auto":
    return "xla"
  raise UserError(f"config.model.attention={backend} {refused}; auto takes what is there")


def self_attention(
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array,
    *,
    window: int,
    scale: float,
    backend: str,
    mask_Bx1xTxT: jax.Array | None = None,
) -> jax.Array:
  """Causal grouped-query attention of whole rows, [B, T, N, H] in the dtype of q.

  The tokens of a segment are contiguous, so that a distance in slots is one in tokens. What a
  padding query (segment 0) gives is finite, differs between backends, and reaches no other.

  Args:
    window: tokens a query sees, itself included; 0 sees the whole segment.
    scale: multiplies q.k.
    backend: xla | cudnn | splash, from `resolve_backend`.
    mask_Bx1xTxT: for xla, `attention_mask` of these segments, where layers share it.
  """
  if backend == "xla":
    if mask_Bx1xTxT is None:
      mask_Bx1xTxT = attention_mask(segment_ids_BxT, segment_ids_BxT, 0, window)
    return attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask_Bx1xTxT, scale)
  if backend == "cudnn":
    kernel = cudnn_attention
  elif backend == "splash":
    interpret = target_platform() == "cpu"
    kernel = functools.partial(splash.splash_attention, interpret=interpret)
  else:
    raise ValueError(f"backend={backend!r} is not one of xla, cudnn, splash")
  kernel = functools.partial(kernel, window=window, scale=scale)
  return _on_each_device(kernel, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)


def cudnn_attention(
    q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT, *, window: int, scale: float
) -> jax.Array:
  """`self_attention` by the fused kernel of cuDNN, on one GPU.

  cuDNN has no segments, and its sliding window excludes a bias (before cuDNN 9.10.2), so both
  become a bias [B, 1, T, T]; causality is told as well, for the blocks it saves. Padding
  queries see themselves, because an empty softmax is not finite there.
  """
  length = q_BxTxNxH.shape[1]
  pad = length % 2  # The backward pass with a bias takes even lengths only.
  if pad:
    rows = lambda x: jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    q_BxTxNxH, k_BxTxKxH, v_BxTxKxH = rows(q_BxTxNxH), rows(k_BxTxKxH), rows(v_BxTxKxH)
    segment_ids_BxT = rows(segment_ids_BxT)
  mask_Bx1xTxT = attention_mask(segment_ids_BxT, segment_ids_BxT, 0, window)
  mask_Bx1xTxT |= jnp.eye(length + pad, dtype=bool)[None, None]
  out_BxTxNxH = jax.nn.dot_product_attention(
      q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask_Bx1xTxT, scale=scale, is_causal=True,
      implementation="cudnn",
  )
  return out_BxTxNxH[:, :length]


def _on_each_device(kernel, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT) -> jax.Array:
  """Calls a kernel that the partitioner cannot split on each device's rows and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
  q_spec = resolve(("batch", "sequence", "heads", "head_dim"), q_BxTxNxH.shape, mesh)
  kv_spec = resolve(("batch", "sequence", "kv_heads", "head_dim"), k_BxTxKxH.shape, mesh)
  rows = resolve(("batch", "sequence"), segment_ids_BxT.shape, mesh)
  group = q_BxTxNxH.shape[2] // k_BxTxKxH.shape[2]

  def local(q, k, v, segment_ids):
    if q_spec[2] is not None and kv_spec[2] is None:
      # All KV heads are here, and some query heads: take what those read. Runs of `run` query
      # heads read one KV head, also where a device's heads begin or end inside of a group.
      heads = q.shape[2]
      run = math.gcd(heads, group)
      first = jax.lax.axis_index(q_spec[2]) * heads
      read = (first + jnp.arange(0, heads, run)) // group
      k, v = jnp.take(k, read, axis=2), jnp.take(v, read, axis=2)
    return kernel(q, k, v, segment_ids)

  # The kernels do not say over which axes their results vary, so that it cannot be checked.
  return jax.shard_map(
      local, in_specs=(q_spec, kv_spec, kv_spec, rows), out_specs=q_spec, check_vma=False
  )(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
