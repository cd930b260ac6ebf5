"""The decoder of all model families: a Linen module used as a pure function.

    hidden_BxTxD, cache = Transformer(cfg).apply({"params": params}, tokens_BxT)
    logits_BxTxV = Transformer(cfg).apply({"params": params}, hidden_BxTxD, method="unembed")

The layers of a pattern are scanned, so that compile time and program size do not grow with
the number of layers. Every parameter has logical axes (see `sharding.py`). The KV cache is an
argument and a result.

Parameter tree: embed/table [V, D], group_g/layer_j/{attention,mlp,...} with a leading axis of
R repeats, final_norm/scale [D] and, if the head is untied, head/table [V, D].

Dims: see `models/config.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpr_jax.models import attention as attention_lib
from dpr_jax.models import cache as cache_lib
from dpr_jax.models import lora as lora_lib
from dpr_jax.models.cache import Cache
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.embedding import Embedding
from dpr_jax.models.matmul import matmul
from dpr_jax.models.parameters import parameter
from dpr_jax.sharding import constrain


class RMSNorm(nn.Module):
  """x / rms(x) * w over the last axis, in float32; unit_offset stores w - 1.

  The rank of x varies: [B, T, D] in a layer, [B, T, N, H] for queries and keys.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    init = nn.initializers.zeros if cfg.norm_unit_offset else nn.initializers.ones
    scale = parameter(self, "scale", init, ("norm",), (x.shape[-1],)).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + cfg.norm_eps)
    if cfg.norm_unit_offset:
      scale = 1.0 + scale
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Projection(nn.Module):
  """Linear map of x [..., in dims] to [..., out dims], with an optional bias and LoRA adapter.

  Ranks vary: heads and head_dim are two dims of a kernel, on the input or the output side.
  """

  cfg: ModelConfig
  out_shape: tuple[int, ...]
  in_axes: tuple[str | None, ...]
  out_axes: tuple[str | None, ...]
  init_scale: float = 1.0  # variance * fan_in at initialisation.
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    dtype, n_in = jnp.dtype(self.cfg.dtype), len(self.in_axes)
    in_shape = x.shape[-n_in:]
    init = nn.initializers.variance_scaling(
        self.init_scale,
        "fan_in",
        "truncated_normal",
        in_axis=tuple(range(n_in)),
        out_axis=tuple(range(n_in, n_in + len(self.out_shape))),
    )
    shape = in_shape + self.out_shape
    kernel = parameter(self, "kernel", init, self.in_axes + self.out_axes, shape)
    y = matmul(x, kernel.astype(dtype), n_in)
    if self.use_bias:
      bias = parameter(self, "bias", nn.initializers.zeros, self.out_axes, self.out_shape)
      bias = bias.astype(dtype)
      y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    low_rank = lora_lib.adapter(
        self, self.cfg.lora, x, self.in_axes, self.out_axes, self.out_shape, dtype
    )
    return y if low_rank is None else y + low_rank


class Attention(nn.Module):
  """Grouped-query self-attention of one layer, over whole rows or over the cache."""

  cfg: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x_BxTxD, kv, layer, shared):
    cfg = self.cfg
    project = lambda name, heads, axis: Projection(
        cfg, (heads, cfg.head_dim), ("embed",), (axis, "head_dim"), use_bias=cfg.qkv_bias, name=name
    )(x_BxTxD)
    q_BxTxNxH = project("query", cfg.num_heads, "heads")
    k_BxTxKxH = project("key", cfg.num_kv_heads, "kv_heads")
    v_BxTxKxH = project("value", cfg.num_kv_heads, "kv_heads")
    if cfg.qk_norm:
      q_BxTxNxH = RMSNorm(cfg, name="query_norm")(q_BxTxNxH)
      k_BxTxKxH = RMSNorm(cfg, name="key_norm")(k_BxTxKxH)
    q_BxTxNxH = attention_lib.rotate(q_BxTxNxH, *shared["rope"][self.kind])
    k_BxTxKxH = attention_lib.rotate(k_BxTxKxH, *shared["rope"][self.kind])
    q_BxTxNxH = constrain(q_BxTxNxH, "batch", "sequence", "heads", "head_dim")
    k_BxTxKxH = constrain(k_BxTxKxH, "batch", "sequence", "kv_heads", "head_dim")
    v_BxTxKxH = constrain(v_BxTxKxH, "batch", "sequence", "kv_heads", "head_dim")
    scale = cfg.query_scale or cfg.head_dim**-0.5
    if kv is None:
      out_BxTxNxH = attention_lib.self_attention(
          q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, shared["segment_ids"], window=cfg.window_of(self.kind),
          scale=scale, backend=attention_lib.resolve_backend(cfg, x_BxTxD.shape[1]),
          mask_Bx1xTxT=shared["mask"][self.kind],
      )
      if "keep" in shared:  # A prefill, which builds a cache.
        kv = cache_lib.heads_first(k_BxTxKxH, v_BxTxKxH)
    else:
      new = cache_lib.heads_first(k_BxTxKxH, v_BxTxKxH)
      kv, seen = cache_lib.store(kv, new, layer, shared["slots"][self.kind])
      out_BxTxNxH = attention_lib.attend_cache(q_BxTxNxH, *seen, shared["mask"][self.kind], scale)
    out_BxTxNxH = constrain(out_BxTxNxH, "batch", "sequence", "heads", "head_dim")
    out_BxTxD = Projection(
        cfg, (cfg.hidden_size,), ("heads", "head_dim"), ("embed",),
        init_scale=1.0 / (2 * cfg.num_layers), name="out",
    )(out_BxTxNxH)
    return out_BxTxD, kv


class MLP(nn.Module):
  """Gated MLP: down(act(gate(x)) * up(x))."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BxTxD):
    cfg = self.cfg
    wide = lambda name: Projection(cfg, (cfg.mlp_size,), ("embed",), ("mlp",), name=name)(x_BxTxD)
    gate_BxTxF, up_BxTxF = wide("gate"), wide("up")
    act = jax.nn.silu if cfg.activation == "silu" else lambda a: jax.nn.gelu(a, approximate=True)
    h_BxTxF = constrain(act(gate_BxTxF) * up_BxTxF, "batch", "sequence", "mlp")
    return Projection(
        cfg, (cfg.hidden_size,), ("mlp",), ("embed",),
        init_scale=1.0 / (2 * cfg.num_layers), name="down",
    )(h_BxTxF)


class Layer(nn.Module):
  """Pre-norm residual layer; Gemma 3 also normalises the output of each branch."""

  cfg: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x_BxTxD, kv, layer, shared):
    cfg = self.cfg
    h_BxTxD, kv = Attention(cfg, self.kind, name="attention")(
        RMSNorm(cfg, name="attention_norm")(x_BxTxD), kv, layer, shared
    )
    if cfg.sandwich_norm:
      h_BxTxD = RMSNorm(cfg, name="attention_post_norm")(h_BxTxD)
    x_BxTxD = x_BxTxD + h_BxTxD
    h_BxTxD = MLP(cfg, name="mlp")(RMSNorm(cfg, name="mlp_norm")(x_BxTxD))
    if cfg.sandwich_norm:
      h_BxTxD = RMSNorm(cfg, name="mlp_post_norm")(h_BxTxD)
    return constrain(x_BxTxD + h_BxTxD, "batch", "sequence", None), kv


class Pattern(nn.Module):
  """The layers of one pattern, the body of the scan."""

  cfg: ModelConfig
  pattern: tuple[str, ...]

  @nn.compact
  def __call__(self, carry, layer, shared):
    x_BxTxD, caches = carry
    out = []
    for j, kind in enumerate(self.pattern):
      kv = None if caches is None else caches[j]
      x_BxTxD, kv = Layer(self.cfg, kind, name=f"layer_{j}")(x_BxTxD, kv, layer, shared)
      out.append(kv)
    # The scan carries an existing cache, written in place, and stacks the outputs of a prefill.
    return (x_BxTxD, None if caches is None else tuple(out)), tuple(out) if caches is None else None


class Transformer(nn.Module):
  """Decoder-only language model. The module docstring shows its use."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    body = Pattern
    if cfg.remat != "none":
      body = nn.remat(Pattern, policy=policies[cfg.remat], prevent_cse=False)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "lora": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    self.embed = Embedding(cfg)
    self.group = [scanned(cfg, pattern) for pattern, _ in cfg.groups]
    self.final_norm = RMSNorm(cfg)
    if not cfg.tied_head:
      self.head = Embedding(cfg)

  def __call__(
      self, tokens_BxT, positions_BxT=None, segment_ids_BxT=None, cache: Cache | None = None
  ):
    """Runs the decoder over T tokens per row, which follow those in the cache if there is one.

    Args:
      tokens_BxT: int32 token ids.
      positions_BxT: int32 positions; by default counted within each segment, continuing from
        the cache.
      segment_ids_BxT: int32, 0 for padding, 1, 2, ... for packed rows; by default all 1. A 0/1
        attention mask is a valid value. Padding may be on the left or on the right.
      cache: keys and values of earlier tokens of the same rows; one segment per row.

    Returns:
      (hidden_BxTxD after the final norm, in the compute dtype; the new cache or None).
    """
    return self._run(tokens_BxT, positions_BxT, segment_ids_BxT, cache)

  def prefill(self, tokens_BxP, segment_ids_BxP, *, slots: int) -> tuple[jax.Array, Cache]:
    """Runs right-aligned prompts and builds a cache with room for `slots` more tokens per row.

    Attention runs over whole rows, so nothing is computed over empty slots. Local layers keep
    only their window.

    Args:
      segment_ids_BxP: int32, 1 for the prompt, 0 for the padding to its left.

    Returns:
      (hidden_BxPxD, cache); decoding from the cache equals a call on the whole rows.
    """
    hidden_BxPxD, made = self._run(tokens_BxP, None, segment_ids_BxP, None, keep=True)
    return hidden_BxPxD, cache_lib.from_prefill(self.cfg, made, segment_ids_BxP, slots)

  def _run(self, tokens_BxT, positions_BxT, segment_ids_BxT, cache, keep=False):
    """Returns hidden states and the new cache, this call's keys and values if `keep`, or None."""
    cfg = self.cfg
    if segment_ids_BxT is None:
      segment_ids_BxT = jnp.ones_like(tokens_BxT)
    if positions_BxT is None:
      positions_BxT = attention_lib.positions_of(segment_ids_BxT)
      if cache is not None:
        positions_BxT = positions_BxT + cache.lengths[:, None]
    tokens_BxT = constrain(tokens_BxT, "batch", "sequence")

    kinds = sorted(set(cfg.layer_pattern))
    shared = {
        "segment_ids": segment_ids_BxT,
        "rope": {
            kind: attention_lib.rope_tables(cfg.rope_of(kind), cfg.head_dim, positions_BxT)
            for kind in kinds
        },
    }
    if cache is not None:
      cache, shared["slots"], shared["mask"] = cache_lib.advance(
          cache, segment_ids_BxT, cfg.window_of
      )
    elif attention_lib.resolve_backend(cfg, tokens_BxT.shape[1]) == "xla":
      # Only XLA takes the mask as an array, which all layers of a kind share.
      shared["mask"] = {
          kind: attention_lib.attention_mask(
              segment_ids_BxT, segment_ids_BxT, 0, cfg.window_of(kind)
          )
          for kind in kinds
      }
    else:
      shared["mask"] = dict.fromkeys(kinds)
    if keep:
      shared["keep"] = ()

    # Prefill and decoding get gathered weights (`variables.gathered`).
    x_BxTxD = self.embed.lookup(tokens_BxT, gathered=keep or cache is not None)
    if cfg.embed_scale != 1.0:
      # The scale is rounded to the compute dtype, as in the training of the published weights.
      x_BxTxD = x_BxTxD * jnp.asarray(cfg.embed_scale, x_BxTxD.dtype)
    kept = []
    for g, (_, repeats) in enumerate(cfg.groups):
      kv = None if cache is None else cache.kv[g]
      layers = jnp.arange(repeats, dtype=jnp.int32)
      (x_BxTxD, kv), made = self.group[g]((x_BxTxD, kv), layers, shared)
      kept.append(made if cache is None else kv)
    hidden_BxTxD = self.final_norm(x_BxTxD)
    if cache is not None:
      return hidden_BxTxD, cache.replace(kv=tuple(kept))
    return hidden_BxTxD, tuple(kept) if keep else None

  def unembed(self, hidden):
    """Logits, float32 [..., V], of hidden states [B, T, D], or [B, D] in a decoding step."""
    return (self.embed if self.cfg.tied_head else self.head).logits(hidden)

  def init_all(self, tokens_BxT):
    """Uses every parameter, for `init`."""
    hidden_BxTxD, _ = self(tokens_BxT)
    return self.unembed(hidden_BxTxD[:, :1])


def init_variables(cfg: ModelConfig, rng: jax.Array) -> dict[str, Any]:
  """Initialises variables, boxed with their logical axes (see `sharding.shardings_of`)."""
  rngs = {"params": rng, "lora": jax.random.fold_in(rng, 1)}
  return Transformer(cfg).init(rngs, jnp.zeros((1, 2), jnp.int32), method="init_all")
