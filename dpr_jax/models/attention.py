"""Attention over packed rows or over a cache, and rotary position embeddings.

Masks are computed from slots and segments, never from token ids. Slot t sees slot s iff
s <= t, both belong to the same segment, that segment is not 0 (padding), and, in a local
layer, s is fewer than `window` tokens before t. Padding slots are not counted as tokens, so
a window spans the same positions wherever the padding is.

Whole rows without a cache go through `self_attention`, which has a kernel for each
platform; `attend` is the XLA implementation, against which the kernels are tested.

Dims: see `models/config.py`; G = N / K query heads per KV head, J = H / 2 rotary frequencies.
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
  changes_BxT = segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1]
  starts_BxT = jnp.pad(changes_BxT, ((0, 0), (1, 0)), constant_values=True)
  index_BxT = jnp.broadcast_to(index_1xT, segment_ids_BxT.shape)
  first_BxT = jax.lax.cummax(jnp.where(starts_BxT, index_BxT, 0), axis=1)
  return index_BxT - first_BxT


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
  """Angular frequencies in radians per token, float32 [J].

  The llama3 rule follows Llama 3.1's published description (and transformers'
  `_compute_llama3_parameters`): it divides the frequencies of long wavelengths by `factor`,
  keeps those of short ones, and interpolates in between.
  """
  exponent_J = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency_J = 1.0 / (rope.theta**exponent_J)
  if rope.scaling == "none":
    return frequency_J
  if rope.scaling == "linear":
    return frequency_J / rope.factor
  if rope.scaling != "llama3":
    raise ValueError(f"rope scaling {rope.scaling!r} is not one of none, linear, llama3")
  wavelength_J = 2 * jnp.pi / frequency_J
  low, high = rope.low_freq_factor, rope.high_freq_factor
  smooth_J = (rope.original_max_length / wavelength_J - low) / (high - low)
  smooth_J = jnp.clip(smooth_J, 0.0, 1.0)
  return (1 - smooth_J) * frequency_J / rope.factor + smooth_J * frequency_J


def rope_tables(rope: Rope, head_dim: int, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotation angles for `rotate`, float32 [B, T, 1, J]."""
  frequencies_1x1xJ = rope_frequencies(rope, head_dim)[None, None, :]
  angle_BxTxJ = positions_BxT[:, :, None].astype(jnp.float32) * frequencies_1x1xJ
  return jnp.cos(angle_BxTxJ)[:, :, None, :], jnp.sin(angle_BxTxJ)[:, :, None, :]


def rotate(x_BxTxNxH: jax.Array, cos_BxTx1xJ: jax.Array, sin_BxTx1xJ: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + J) of each head (the half-split convention)."""
  a_BxTxNxJ, b_BxTxNxJ = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
  first_BxTxNxJ = a_BxTxNxJ * cos_BxTx1xJ - b_BxTxNxJ * sin_BxTx1xJ
  second_BxTxNxJ = b_BxTxNxJ * cos_BxTx1xJ + a_BxTxNxJ * sin_BxTx1xJ
  return jnp.concatenate([first_BxTxNxJ, second_BxTxNxJ], axis=-1).astype(x_BxTxNxH.dtype)


def attention_mask(
    q_segments_BxT: jax.Array, kv_segments_BxS: jax.Array, q_start: jax.Array | int, window: int = 0
) -> jax.Array:
  """True where a query sees a slot, bool [B, 1, T, S]; query t is in slot q_start + t."""
  q_slot_Tx1 = q_start + jnp.arange(q_segments_BxT.shape[1], dtype=jnp.int32)[:, None]
  kv_slot_1xS = jnp.arange(kv_segments_BxS.shape[1], dtype=jnp.int32)[None, :]
  seen_BxTxS = q_segments_BxT[:, :, None] == kv_segments_BxS[:, None, :]
  seen_BxTxS &= (q_segments_BxT != 0)[:, :, None] & (kv_slot_1xS <= q_slot_Tx1)[None, :, :]
  if window:
    # Distances count tokens, not slots: padding may separate a prompt from its response.
    rank_BxS = jnp.cumsum(kv_segments_BxS != 0, axis=1, dtype=jnp.int32)
    q_rank_BxT = jax.lax.dynamic_slice_in_dim(rank_BxS, q_start, q_segments_BxT.shape[1], axis=1)
    seen_BxTxS &= q_rank_BxT[:, :, None] - rank_BxS[:, None, :] < window
  return seen_BxTxS[:, None, :, :]


def attend(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_Bx1xTxS, scale: float) -> jax.Array:
  """Grouped-query attention, softmax in float32; a query that sees no slot gets finite garbage."""
  return jax.nn.dot_product_attention(
      q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask=mask_Bx1xTxS, scale=scale
  )


def attend_cache(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, mask_Bx1xTxS, scale: float) -> jax.Array:
  """`attend` over the cache, whose keys and values have the head axis before the slot axis."""
  B, T, N, H = q_BxTxNxH.shape
  _, K, S, _ = k_BxKxSxH.shape
  # dot_general, not einsum: einsum may make the cache the left operand, which a CPU copies.
  heads = ((0, 1), (0, 1))
  matmul = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  q_BxKxTxGxH = jnp.moveaxis(q_BxTxNxH.reshape(B, T, K, N // K, H), 2, 1)
  score_BxKxTxGxS = scale * matmul(q_BxKxTxGxH, k_BxKxSxH, (((4,), (3,)), heads))
  unseen = 0.5 * jnp.finfo(jnp.float32).min  # Finite, because a query may see no slot.
  score_BxKxTxGxS = jnp.where(mask_Bx1xTxS[:, :, :, None], score_BxKxTxGxS, unseen)
  weight_BxKxTxGxS = jax.nn.softmax(score_BxKxTxGxS, axis=-1).astype(v_BxKxSxH.dtype)
  out_BxKxTxGxH = matmul(weight_BxKxTxGxS, v_BxKxSxH, (((4,), (2,)), heads))
  return jnp.moveaxis(out_BxKxTxGxH, 1, 2).reshape(B, T, N, H).astype(q_BxTxNxH.dtype)


def target_platform() -> str:
  """Returns "cpu", "gpu" or "tpu": the platform of the current mesh, else the default backend.

  Ahead-of-time compilation sets a mesh of abstract devices, which need not be those of this host.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return jax.default_backend() if device is None else device.platform


def resolve_backend(cfg: ModelConfig, length: int) -> str:
  """Selects the backend for rows of `length` tokens on the target platform: xla, cudnn or splash.

  "auto" selects the kernel of the platform if it supports the dtype and the shapes, else XLA.

  Raises:
    UserError: `cfg.attention` names a backend that this platform or this model cannot use.
  """
  platform, dtype = target_platform(), jnp.dtype(cfg.dtype)
  refused = ""
  if cfg.attention == "cudnn" or (cfg.attention == "auto" and platform == "gpu"):
    # A head_dim of 128 works on every GPU since Ampere, forward and backward; 256 needs Hopper.
    widest = 128 if cfg.attention == "auto" else 256
    if platform != "gpu":
      refused = f"needs a GPU, and this is a {platform.upper()}"
    elif dtype not in (jnp.bfloat16, jnp.float16):
      refused = f"needs dtype=bfloat16, not {dtype}"
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
  raise UserError(f"attention={backend} {refused}; auto takes one that is available")


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
  """Causal grouped-query attention over whole rows, [B, T, N, H] in the dtype of q.

  The tokens of a segment must be contiguous, so that distances in slots are distances in tokens.
  Outputs at padding (segment 0) are finite, differ between backends, and affect no other output.

  Args:
    window: tokens that a query sees, itself included; 0 means the whole segment.
    scale: multiplies q.k.
    backend: xla | cudnn | splash, from `resolve_backend`.
    mask_Bx1xTxT: precomputed `attention_mask`, to share it between layers; used by xla only.
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
  """`self_attention` on one GPU with cuDNN's fused kernel.

  cuDNN does not support segments, nor (before 9.10.2) a sliding window together with a bias, so
  both are passed as a bias [B, 1, T, T]. `is_causal` is set as well, so that cuDNN skips blocks
  above the diagonal. Padding queries see themselves, because cuDNN's empty softmax is not finite.
  """
  length = q_BxTxNxH.shape[1]
  pad = length % 2  # The backward pass with a bias supports even lengths only.
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
  """Runs a kernel that GSPMD cannot partition on the rows and heads of each device."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
  q_spec = resolve(("batch", "sequence", "heads", "head_dim"), q_BxTxNxH.shape, mesh)
  kv_spec = resolve(("batch", "sequence", "kv_heads", "head_dim"), k_BxTxKxH.shape, mesh)
  rows = resolve(("batch", "sequence"), segment_ids_BxT.shape, mesh)
  group = q_BxTxNxH.shape[2] // k_BxTxKxH.shape[2]

  def local(q, k, v, segment_ids):
    if q_spec[2] is not None and kv_spec[2] is None:
      # The device holds all KV heads but only some query heads: select the KV heads they read.
      # `run` adjacent query heads share one KV head, even if a group is split between devices.
      heads = q.shape[2]
      run = math.gcd(heads, group)
      first = jax.lax.axis_index(q_spec[2]) * heads
      read = (first + jnp.arange(0, heads, run)) // group
      k, v = jnp.take(k, read, axis=2), jnp.take(v, read, axis=2)
    return kernel(q, k, v, segment_ids)

  # The kernels do not declare over which mesh axes their outputs vary, so VMA cannot be checked.
  return jax.shard_map(
      local, in_specs=(q_spec, kv_spec, kv_spec, rows), out_specs=q_spec, check_vma=False
  )(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, segment_ids_BxT)
