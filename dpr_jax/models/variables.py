"""Creates, describes and casts the variables of a model on a mesh, as plain pytrees without boxes.

`variables = {"params": ...}`, with LoRA also {"lora": ...}. The values do not depend on the mesh:
random bits are the same for every sharding.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpr_jax import sharding
from dpr_jax.keys import make_key
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.transformer import init_variables


def _boxed(cfg: ModelConfig) -> Any:
  return jax.eval_shape(lambda rng: init_variables(cfg, rng), make_key(0))


def abstract_variables(cfg: ModelConfig, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Any:
  """Returns ShapeDtypeStructs with shardings, for restoring checkpoints or for lowering.

  Args:
    dtype: of the parameters; None means float32, the dtype of training.
  """
  boxed = _boxed(cfg)
  shapes, shardings = nn.meta.unbox(boxed), sharding.shardings_of(boxed, mesh)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, shardings
  )


def head_of(cfg: ModelConfig, variables: Any) -> Any:
  """The part of variables that `unembed` reads."""
  return variables["params"]["embed" if cfg.tied_head else "head"]


def random_variables(cfg: ModelConfig, mesh: jax.sharding.Mesh, rng: jax.Array) -> Any:
  """Creates random float32 variables, directly in their shards."""
  shardings = sharding.shardings_of(_boxed(cfg), mesh)
  return jax.jit(lambda key: nn.meta.unbox(init_variables(cfg, key)), out_shardings=shardings)(rng)


def random_adapter(cfg: ModelConfig, mesh: jax.sharding.Mesh, rng: jax.Array) -> Any:
  """Creates the "lora" collection of `random_variables` without the parameters."""
  shardings = sharding.shardings_of(_boxed(cfg)["lora"], mesh)
  make = lambda key: nn.meta.unbox(init_variables(cfg, key)["lora"])
  return jax.jit(make, out_shardings=shardings)(rng)


def cast(variables: Any, dtype: str) -> Any:
  """Copies to `dtype` with the same shardings; never aliases, so either side can be donated."""
  shardings = jax.tree.map(lambda x: x.sharding, variables)
  copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, dtype), tree)
  return jax.jit(copy, out_shardings=shardings)(variables)


def gathered(cfg: ModelConfig, variables: Any) -> Any:
  """Prepares variables for decoding, inside a jit and once before the loop over tokens.

  Matrices are cast to the compute dtype and gathered over fsdp; they stay split over tensor. A
  decoding step then neither gathers the whole model nor reads float32. This holds `num_params /
  tensor` elements per device while the loop runs. The results are equal bit for bit, because
  the model makes the same cast; norms, which it computes in float32, are left unchanged.
  """
  if cfg.dtype == "float32" and sharding.mesh_shape()[1] == 1:
    return variables
  boxed = _boxed(cfg)

  def leaf(box, x):
    if "norm" in box.names:
      return x
    return sharding.gather_weight(x, jnp.dtype(cfg.dtype), box.names)

  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return {
      name: jax.tree.map(leaf, boxed[name], tree, is_leaf=is_box)
      for name, tree in variables.items()
  }


def mean(trees: Sequence[Any]) -> Any:
  """Averages the weights of several variables; the result has the shardings of the first."""
  shardings = jax.tree.map(lambda x: x.sharding, trees[0])
  average = lambda *trees: jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
  return jax.jit(average, out_shardings=shardings)(*trees)


def extrapolate(sft: Any, ref: Any, alpha: float) -> Any:
  """Returns theta_sft + alpha (theta_sft - theta_ref), a training-free baseline.

  With LoRA it extrapolates the two factors of each adapter; a frozen base does not change.
  """
  shardings = jax.tree.map(lambda x: x.sharding, sft)

  def leaf(a, b):
    a32 = a.astype(jnp.float32)
    return (a32 + alpha * (a32 - b.astype(jnp.float32))).astype(a.dtype)

  combine = lambda sft, ref: jax.tree.map(leaf, sft, ref)
  return jax.jit(combine, out_shardings=shardings)(sft, ref)
