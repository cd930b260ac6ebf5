"""Maps the tensor names of each family to paths in the parameter tree.

A matrix in a file is [out, in]; a kernel in the tree is [in..., out...], stacked over the R
repeats of its scanned group. Norms, biases and embeddings keep their axes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dpr_jax.keys import make_key
from dpr_jax.models import ModelConfig, init_variables

# Path below the layer -> names below the layer (Hugging Face, GGUF), without .weight or .bias.
_ATTENTION = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention/query": ("self_attn.q_proj", "attn_q"),
    "attention/key": ("self_attn.k_proj", "attn_k"),
    "attention/value": ("self_attn.v_proj", "attn_v"),
    "attention/query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention/key_norm": ("self_attn.k_norm", "attn_k_norm"),
    "attention/out": ("self_attn.o_proj", "attn_output"),
}
_MLP = {
    "mlp/gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp/up": ("mlp.up_proj", "ffn_up"),
    "mlp/down": ("mlp.down_proj", "ffn_down"),
}
_PRE_NORM = {**_ATTENTION, "mlp_norm": ("post_attention_layernorm", "ffn_norm"), **_MLP}
_SANDWICH_NORM = {
    **_ATTENTION,
    "attention_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    **_MLP,
    "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
# Parameters outside the layers.
_TOP = {
    "embed": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}
HF, GGUF = 0, 1
_LAYERS = ("model.layers.", "blk.")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """One tensor of a file and its place in the parameter tree."""

  name: str  # in the file.
  path: tuple[str, ...]  # of the parameter, below "params".
  repeat: int | None  # index along the stacked axis; None outside the layers.
  shape: tuple[int, ...]  # in the file.
  param_shape: tuple[int, ...]  # of this repeat of the parameter.

  @property
  def is_kernel(self) -> bool:
    return self.path[-1] == "kernel"

  def to_param(self, x: np.ndarray) -> np.ndarray:
    """Converts from the file's layout to the parameter's (a view if possible)."""
    return (x.T if self.is_kernel else x).reshape(self.param_shape)

  def to_file(self, x: np.ndarray) -> np.ndarray:
    """Converts from the parameter's layout to the file's (a view if possible)."""
    return x.reshape(self.shape[::-1]).T if self.is_kernel else x.reshape(self.shape)


@functools.lru_cache(maxsize=8)
def abstract_params(cfg: ModelConfig) -> Any:
  """Returns the shapes of the parameters, boxed with their logical axes."""
  cfg = dataclasses.replace(cfg, remat="none", attention="xla")
  return jax.eval_shape(lambda key: init_variables(cfg, key), make_key(0))["params"]


# Nested dicts <-> {path: leaf}.
flatten, unflatten = traverse_util.flatten_dict, traverse_util.unflatten_dict


def tensor_specs(cfg: ModelConfig, naming: int = HF) -> list[TensorSpec]:
  """Lists the tensors of a model's file, layer by layer, under Hugging Face or GGUF names."""
  table = _SANDWICH_NORM if cfg.sandwich_norm else _PRE_NORM
  first, starts = 0, []
  for pattern, repeats in cfg.groups:
    starts.append((first, len(pattern)))
    first += len(pattern) * repeats
  specs = []
  for path, leaf in flatten(abstract_params(cfg)).items():
    shape = tuple(leaf.value.shape)
    suffix = ".bias" if path[-1] == "bias" else ".weight"
    if not path[0].startswith("group_"):
      specs.append((-1, TensorSpec(_TOP[path[0]][naming] + suffix, path, None, shape, shape)))
      continue
    start, period = starts[int(path[0].removeprefix("group_"))]
    offset = start + int(path[1].removeprefix("layer_"))
    below = table["/".join(path[2:-1])][naming]
    one = file_shape = shape[1:]
    if path[-1] == "kernel":
      n_in = 2 if path[-2] == "out" else 1
      file_shape = (math.prod(one[n_in:]), math.prod(one[:n_in]))
    elif path[-1] == "bias":
      file_shape = (math.prod(one),)
    for r in range(shape[0]):
      layer = offset + r * period
      name = f"{_LAYERS[naming]}{layer}.{below}{suffix}"
      specs.append((layer, TensorSpec(name, path, r, file_shape, one)))
  return [spec for _, spec in sorted(specs, key=lambda pair: pair[0])]
