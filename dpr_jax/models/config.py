"""The shape of a decoder: one dataclass for every family."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dpr_jax.models.lora import LoRA

GLOBAL, LOCAL = "global", "local"
MAX_SIZE = 10_000_000  # of a dim: more is damage.
ATTENTION = ("auto", "xla", "cudnn", "splash")
# Fields of ModelConfig that say how it is computed, not what; a checkpoint's reader may differ.
COMPUTATION = ("dtype", "scan_layers", "remat", "attention", "logits_budget")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding of one kind of layer."""

  theta: float = 10_000.0  # base of the wavelengths.
  scaling: str = "none"  # none | linear | llama3
  factor: float = 1.0  # linear, llama3: how many times longer than trained.
  low_freq_factor: float = 1.0  # llama3: below it (in original lengths) scale fully.
  high_freq_factor: float = 4.0  # llama3: above it do not scale.
  original_max_length: int = 8192  # llama3: tokens.

  def __post_init__(self):
    if self.scaling not in ("none", "linear", "llama3"):
      raise ValueError(f"rope scaling={self.scaling!r} is not one of none, linear, llama3")
    if self.theta <= 0 or self.factor <= 0:
      raise ValueError(f"rope theta={self.theta} and factor={self.factor} must be above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that decides a decoder's function and the shapes of its parameters.

  Dims in the code: V vocab_size, D hidden_size, F mlp_size, N num_heads, K num_kv_heads,
  H head_dim, L num_layers; B rows, T tokens, S cache slots, R repeats of a layer pattern.
  """

  vocab_size: int = 272  # tokens; rows of the embedding.
  hidden_size: int = 128  # width of the residual stream.
  mlp_size: int = 384  # width of the MLP.
  num_layers: int = 4  # attention and MLP each.
  num_heads: int = 4  # query heads.
  num_kv_heads: int = 4  # key-value heads; divides num_heads.
  head_dim: int = 32  # width of a head; even.
  max_length: int = 2048  # tokens; the longest sequence the weights were trained for.

  activation: str = "silu"  # silu | gelu_tanh; gates the MLP.
  norm_eps: float = 1e-6  # added to the mean square in RMSNorm.
  norm_unit_offset: bool = False  # RMSNorm multiplies by (1 + w) instead of w (Gemma).
  sandwich_norm: bool = False  # also normalise the output of attention and MLP (Gemma 3).
  qk_norm: bool = False  # RMSNorm over head_dim of queries and keys (Qwen3, Gemma 3).
  qkv_bias: bool = False  # biases on queries, keys and values (Qwen2).
  tied_head: bool = True  # the output head is the embedding table.
  embed_scale: float = 1.0  # multiplies the embeddings (sqrt(D) for Gemma).
  query_scale: float = 0.0  # multiplies q.k; 0 means head_dim ** -0.5.

  # Repeated over the layers: `global` ones see all tokens, `local` ones a window.
  layer_pattern: tuple[str, ...] = (GLOBAL,)  # kinds of layers, global | local.
  window: int = 0  # tokens that a `local` layer sees, the current one included.
  rope: Rope = Rope()  # of all layers, or of the `global` ones.
  local_rope: Rope | None = None  # of `local` layers where it differs; None: as `rope`.

  lora: LoRA = LoRA()  # adapters beside the weights; rank 0 has none.

  # How it is computed, not what: see COMPUTATION.
  dtype: str = "float32"  # activations and matmuls; parameters keep their own dtype.
  scan_layers: bool = True  # False: every pattern is a group of its own; see models/unrolled.py.
  remat: str = "full"  # none | dots | full: what the backward pass recomputes in a layer.
  attention: str = "auto"  # auto | xla | cudnn | splash: over whole rows; see models/attention.py.
  logits_budget: float = 0.25  # GiB per device for logits that live at a time; models/logprobs.py.

  def __post_init__(self):
    object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
    for name in ("rope", "local_rope"):
      if isinstance(getattr(self, name), Mapping):
        object.__setattr__(self, name, Rope(**getattr(self, name)))
    if isinstance(self.lora, Mapping):
      object.__setattr__(self, "lora", LoRA(**self.lora))
    for name in ("hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    for name in ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "head_dim"):
      if not 0 <= getattr(self, name) < MAX_SIZE:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below {MAX_SIZE}")
    if self.head_dim % 2 or not 1 <= self.max_length < 2**31 or self.window < 0:
      raise ValueError(f"head_dim={self.head_dim} must be even, max_length={self.max_length} at "
                       f"least 1 (and below 2^31) and window={self.window} at least 0")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads={self.num_heads} is not a multiple of "
                       f"num_kv_heads={self.num_kv_heads}")
    if LOCAL in self.layer_pattern and self.window < 1:
      raise ValueError("window must be at least 1 where layer_pattern has a local layer")
    if not set(self.layer_pattern) <= {GLOBAL, LOCAL} or not self.layer_pattern:
      raise ValueError(f"layer_pattern={self.layer_pattern}: its entries are 'global' or 'local'")
    for name, known in (
        ("activation", ("silu", "gelu_tanh")),
        ("remat", ("none", "dots", "full")),
        ("attention", ATTENTION),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r} is not one of {known}")
    jnp.dtype(self.dtype)

  @property
  def groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
    """(pattern, repeats) of each scanned group: whole patterns, then what is left of one.

    Gemma 3 4B (34 layers, 5 local + 1 global): ((5 local + 1 global, 5), (4 local, 1)).
    """
    whole, rest = divmod(self.num_layers, len(self.layer_pattern))
    groups = [(self.layer_pattern, whole)] if whole else []
    if rest:
      groups.append((self.layer_pattern[:rest], 1))
    if not self.scan_layers:
      groups = [(pattern, 1) for pattern, repeats in groups for _ in range(repeats)]
    return tuple(groups)

  @property
  def layer_kinds(self) -> list[str]:
    """global | local, of each layer."""
    return [self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers)]

  def rope_of(self, kind: str) -> Rope:
    return self.local_rope if kind == LOCAL and self.local_rope is not None else self.rope

  def window_of(self, kind: str) -> int:
    """Tokens that a layer of this kind sees; 0: all."""
    return self.window if kind == LOCAL else 0

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
    return cls(**fields)

  def difference(self, other: "ModelConfig", ignored: Collection[str] = COMPUTATION) -> str:
    """The first field in which another one differs, as in "num_layers (4 and 2)"; "" if none."""
    for field in dataclasses.fields(self):
      x, y = getattr(self, field.name), getattr(other, field.name)
      if x != y and field.name not in ignored:
        return f"{field.name} ({x} and {y})"
    return ""

  @property
  def num_params(self) -> int:
    """Parameters of the model, the tied head counted once, adapters not."""
    d, f, h = self.hidden_size, self.mlp_size, self.head_dim
    q, kv = self.num_heads * h, self.num_kv_heads * h
    layer = d * (2 * q + 2 * kv) + 3 * d * f + (4 if self.sandwich_norm else 2) * d
    layer += (q + 2 * kv) * self.qkv_bias + 2 * h * self.qk_norm
    return self.num_layers * layer + (1 if self.tied_head else 2) * self.vocab_size * d + d


def pattern_of(layer_types: Sequence[str]) -> tuple[str, ...]:
  """The shortest pattern whose repetition (cut at the end) gives `layer_types`."""
  types = tuple(layer_types)
  for period in range(1, len(types) + 1):
    if all(types[i] == types[i % period] for i in range(len(types))):
      return types[:period]
  return types
