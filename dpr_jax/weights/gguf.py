"""Reads the ModelConfig and parameters of GGUF files, for the architectures listed below.

It undoes three conventions of llama.cpp: Llama's q and k rows are interleaved for ggml's rope,
Gemma's norms are stored as 1 + w, and llama3 rope scaling is a tensor of frequency divisors.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig, Rope
from dpr_jax.models.attention import rope_frequencies
from dpr_jax.weights import hf_config
from dpr_jax.weights.gguf_file import GGUFFile
from dpr_jax.weights.names import GGUF, tensor_specs
from dpr_jax.weights.placement import check_names, fill_params

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
ROPE_DIVISORS = "rope_freqs.weight"

# Keys under the architecture's prefix that are read; others are refused unless neutral.
_READ = frozenset(
    """
    context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon attention.sliding_window attention.sliding_window_pattern
    rope.freq_base rope.freq_base_swa rope.dimension_count rope.scaling.type rope.scaling.factor
    """.split()
)
_IRRELEVANT = frozenset(
    """
    vocab_size tensor_data_layout rope.scaling.original_context_length rope.scaling.finetuned
    mm.tokens_per_image pooling_type
    """.split()
)
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "attn_logit_softcapping": 0,
}


def _decimal(x: Any) -> Any:
  """Converts a float32 to its shortest decimal: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(x))) if isinstance(x, float) else x


def _config(file: GGUFFile) -> ModelConfig:
  where, metadata = file.where, file.metadata
  arch = metadata.get("general.architecture")
  if arch not in ARCHITECTURES:
    raise UserError(
        f"{where}: general.architecture={arch!r} is not implemented; known: "
        f"{', '.join(ARCHITECTURES)}"
    )
  f = {}
  for key, value in metadata.items():
    if not key.startswith(f"{arch}."):
      continue
    name = key.removeprefix(f"{arch}.")
    if name in _READ:
      f[name] = _decimal(value)
    elif name not in _IRRELEVANT and (name not in _NEUTRAL or value != _NEUTRAL[name]):
      raise UserError(f"{where}: {key}={value!r} is not implemented")
  for name in ("embedding_length", "attention.head_count", "block_count"):
    if not isinstance(f.get(name), int) or f[name] < 1:
      raise UserError(f"{where}: {arch}.{name}={f.get(name)!r} must be a positive whole number")
  gemma = arch == "gemma3"
  head_dim = f.get("attention.key_length")
  head_dim = head_dim or (256 if gemma else f["embedding_length"] // f["attention.head_count"])
  for name in ("attention.value_length", "rope.dimension_count"):
    if f.get(name, head_dim) != head_dim:
      raise UserError(
          f"{where}: {arch}.{name}={f[name]!r} is not implemented; it must be {head_dim}"
      )
  if "token_embd.weight" not in file.shapes:
    raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
  scaling = f.get("rope.scaling.type", "none")
  if scaling not in ("none", "linear"):
    raise UserError(
        f"{where}: {arch}.rope.scaling.type={scaling!r} is not implemented; known: none, linear"
    )
  # Sizes never default to those of a Hugging Face class; Gemma's constants are llama.cpp's.
  fields = {
      "model_type": ARCHITECTURES[arch],
      "vocab_size": file.shapes["token_embd.weight"][0],
      "hidden_size": f["embedding_length"],
      "intermediate_size": f.get("feed_forward_length"),
      "num_hidden_layers": f["block_count"],
      "num_attention_heads": f["attention.head_count"],
      "num_key_value_heads": f.get("attention.head_count_kv", f["attention.head_count"]),
      "head_dim": head_dim,
      "max_position_embeddings": f.get("context_length"),
      "rms_norm_eps": f.get("attention.layer_norm_rms_epsilon"),
      "tie_word_embeddings": "output.weight" not in file.shapes,
      "rope_theta": f.get("rope.freq_base", 1e6 if gemma else 1e4),
  }
  if scaling == "linear":
    fields["rope_scaling"] = {"rope_type": "linear", "factor": f.get("rope.scaling.factor")}
  if gemma:
    # Only the 27B model (62 layers) has a query scale that does not follow from its head_dim.
    heads = f["attention.head_count"]
    scalar = f["embedding_length"] // heads if f["block_count"] == 62 else head_dim
    pattern = f.get("attention.sliding_window_pattern", 6)
    fields |= {
        "query_pre_attn_scalar": scalar,
        "sliding_window": f.get("attention.sliding_window"),
        "rope_local_base_freq": f.get("rope.freq_base_swa", 10_000.0),
    }
    if isinstance(pattern, list):  # one flag per layer.
      fields["layer_types"] = ["sliding_attention" if x else "full_attention" for x in pattern]
    else:
      fields["sliding_window_pattern"] = pattern
  elif f.get("attention.sliding_window"):
    raise UserError(
        f"{where}: {arch}.attention.sliding_window={f['attention.sliding_window']!r} is not "
        "implemented; it must be 0 or absent"
    )
  if ROPE_DIVISORS in file.shapes:
    fields["rope_scaling"] = _llama3_scaling(file, fields["rope_theta"], head_dim)
  return hf_config.from_hf(fields, where)


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
  """Returns the llama3 rope parameters that produce the frequency divisors of the file."""
  size = file.shapes[ROPE_DIVISORS][0]
  divisors = np.asarray(file.read(ROPE_DIVISORS, 0, size), np.float32)
  if size == head_dim // 2 and np.all(divisors >= 1):
    plain = np.asarray(rope_frequencies(Rope(theta=theta), head_dim))
    # Published Llama 3 models differ in the factor only: the divisor of the longest wavelengths.
    rope = Rope(theta, "llama3", float(np.round(divisors.max(), 4)), 1.0, 4.0, 8192)
    if np.allclose(plain / np.asarray(rope_frequencies(rope, head_dim)), divisors, rtol=1e-3):
      return hf_config.rope_to_hf(rope)
  raise UserError(f"{file.where}: tensor {ROPE_DIVISORS!r} is not a known llama3 rope scaling")


class _Source:
  """The tensors of a GGUF file under their GGUF names, with llama.cpp's conventions undone."""

  def __init__(self, file: GGUFFile, cfg: ModelConfig):
    self._file, self._cfg = file, cfg
    self._arch = file.metadata["general.architecture"]
    self.where, self.shapes, self.dtype = file.where, file.shapes, file.dtype

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    x = self._file.read(name, start, stop)
    if self._arch == "gemma3" and name.endswith("norm.weight"):
      return x - np.ones((), x.dtype)
    heads = {"attn_q": self._cfg.num_heads, "attn_k": self._cfg.num_kv_heads}
    part = name.split(".")[-2]
    if self._arch == "llama" and part in heads:
      return x.reshape(heads[part], -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    return x


def load_gguf_config(path: pathlib.Path) -> ModelConfig:
  """Reads the ModelConfig of a .gguf file; raises UserError if damaged or not implemented."""
  return _config(GGUFFile(path))


def load_gguf(
    path: pathlib.Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """Implements `dpr_jax.weights.load_pretrained` for a .gguf file."""
  file = GGUFFile(path)
  cfg = _config(file)
  specs = tensor_specs(cfg, GGUF)
  source = _Source(file, cfg)
  check_names(source, specs, lambda name: name == ROPE_DIVISORS)
  return cfg, fill_params(cfg, specs, source, dtype, mesh)
