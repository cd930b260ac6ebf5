"""Reads the ModelConfig and parameters of GGUF files, for the architectures of `families.py`.

It undoes three conventions of llama.cpp: q and k rows may be interleaved for ggml's rope, norms
that multiply by (1 + w) are stored as 1 + w, and llama3 rope scaling is a tensor of divisors.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig, Rope
from dpr_jax.models.attention import rope_frequencies
from dpr_jax.weights import hf_config
from dpr_jax.weights.families import FAMILIES, Family
from dpr_jax.weights.gguf_file import GGUFFile
from dpr_jax.weights.names import GGUF, tensor_specs
from dpr_jax.weights.placement import Source, check_names, fill_params

ROPE_DIVISORS = "rope_freqs.weight"

# Keys below the architecture's name that are read, the first ones as fields of config.json.
# Other keys are refused, unless they are irrelevant or have their neutral value.
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_READ = {*_FIELDS.values()} | {
    "attention.value_length", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
}
_IRRELEVANT = {
    "vocab_size", "tensor_data_layout", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "mm.tokens_per_image", "pooling_type",
}
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


def _family(file: GGUFFile) -> Family:
  arch = file.metadata.get("general.architecture")
  known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf}
  if arch not in known:
    raise UserError(f"{file.where}: general.architecture={arch!r} is not implemented; known: "
                    f"{', '.join(known)}")
  return known[arch]


def _config(file: GGUFFile, family: Family) -> ModelConfig:
  where, arch = file.where, family.gguf.architecture
  f = {"rope.freq_base": 1e4, **family.gguf.absent}
  for key, value in file.metadata.items():
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
  head_dim = f.get("attention.key_length") or f["embedding_length"] // f["attention.head_count"]
  f["attention.key_length"] = head_dim
  f.setdefault("attention.head_count_kv", f["attention.head_count"])
  for name in ("attention.value_length", "rope.dimension_count"):
    if f.get(name, head_dim) != head_dim:
      raise UserError(f"{where}: {arch}.{name}={f[name]!r} is not implemented; it must be "
                      f"{head_dim}")
  if "token_embd.weight" not in file.shapes:
    raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
  scaling = f.get("rope.scaling.type", "none")
  if scaling not in ("none", "linear"):
    raise UserError(f"{where}: {arch}.rope.scaling.type={scaling!r} is not implemented; known: "
                    "none, linear")
  # Sizes never default to those of a Hugging Face class.
  fields = {
      "model_type": family.model_type,
      "vocab_size": file.shapes["token_embd.weight"][0],
      "tie_word_embeddings": "output.weight" not in file.shapes,
      **{field: f.get(key) for field, key in _FIELDS.items()},
      **family.gguf.fields(f),
  }
  if scaling == "linear":
    fields["rope_scaling"] = {"rope_type": "linear", "factor": f.get("rope.scaling.factor")}
  if f.get("attention.sliding_window") and "sliding_window" not in fields:
    raise UserError(f"{where}: {arch}.attention.sliding_window={f['attention.sliding_window']!r} "
                    "is not implemented; it must be 0 or absent")
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

  def __init__(self, file: GGUFFile, cfg: ModelConfig, interleaved: bool):
    self._file, self._cfg, self._interleaved = file, cfg, interleaved
    self.where, self.shapes, self.dtype = file.where, file.shapes, file.dtype

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    x = self._file.read(name, start, stop)
    if self._cfg.norm_unit_offset and name.endswith("norm.weight"):
      return x - np.ones((), x.dtype)
    heads = {"attn_q": self._cfg.num_heads, "attn_k": self._cfg.num_kv_heads}
    part = name.split(".")[-2]
    if self._interleaved and part in heads:
      return x.reshape(heads[part], -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    return x


def load_gguf_config(path: pathlib.Path) -> ModelConfig:
  """Reads the ModelConfig of a .gguf file; raises UserError if damaged or not implemented."""
  file = GGUFFile(path)
  return _config(file, _family(file))


def load_gguf(
    path: pathlib.Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None,
    adapted: Callable[[Source, Mapping[str, str]], Source] = lambda source, names: source,
) -> tuple[ModelConfig, dict[str, Any]]:
  """Implements `dpr_jax.weights.load_pretrained` for a .gguf file; `adapted` as in `hf`."""
  file = GGUFFile(path)
  family = _family(file)
  cfg = _config(file, family)
  specs, source = tensor_specs(cfg, GGUF), _Source(file, cfg, family.gguf.interleaved)
  check_names(source, specs, lambda name: name == ROPE_DIVISORS)
  names = {spec.name: theirs.name for spec, theirs in zip(tensor_specs(cfg), specs)}
  return cfg, fill_params(cfg, specs, adapted(source, names), dtype, mesh)
