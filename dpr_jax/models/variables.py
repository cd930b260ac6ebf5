"""Variables of a model on a mesh: made, described, cast. Plain pytrees, no boxes.

`variables = {"params": ...}`, and with LoRA also {"lora": ...}. Every function works under
any mesh, with the same values on each: random bits do not depend on the layout.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpr_jax import sharding
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.transformer import init_variables


def _boxed(cfg: ModelConfig) -> Any:
  return jax.eval_shape(lambda rng: init_variables(cfg, rng), jax.random.key(0))


def abstract_variables(cfg: ModelConfig, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Any:
  """ShapeDtypeStructs with shardings, to restore or lower against.

  Args:
    dtype: of the parameters; None keeps float32, in which they are trained.
  """
  boxed = _boxed(cfg)
  shapes, shardings = nn.meta.unbox(boxed), sharding.shardings_of(boxed, mesh)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, shardings
  )


def random_variables(cfg: ModelConfig, mesh: jax.sharding.Mesh, rng: jax.Array) -> Any:
  """Random float32 variables, each created in its own shards."""
  shardings = sharding.shardings_of(_boxed(cfg), mesh)
  return jax.jit(lambda key: nn.meta.unbox(init_variables(cfg, key)), out_shardings=shardings)(rng)


def random_adapter(cfg: ModelConfig, mesh: jax.sharding.Mesh, rng: jax.Array) -> Any:
  """The "lora" collection of `random_variables` alone; the parameters are never made."""
  shardings = sharding.shardings_of(_boxed(cfg)["lora"], mesh)
  make = lambda key: nn.meta.unbox(init_variables(cfg, key)["lora"])
  return jax.jit(make, out_shardings=shardings)(rng)


def cast(variables: Any, dtype: str) -> Any:
  """A copy in `dtype` with the same shardings; never an alias, so either side can be donated."""
  shardings = jax.tree.map(lambda x: x.sharding, variables)
  copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, dtype), tree)
  return jax.jit(copy, out_shardings=shardings)(variables)


def gathered(cfg: ModelConfig, variables: Any) -> Any:
  """Inside of a jit: the variables as decoding takes them, once before its loop.

  Matrices are cast to the compute dtype and gathered over fsdp, so that a token costs no gather
  (the bytes of the whole model, for each token) and reads no float32; they stay split over
  tensor. It takes `num_params / tensor` elements a device for as long as the loop runs. The same
  function bit for bit: the model makes that cast itself, and norms, which it computes in
  float32, are left alone.
  """
  if cfg.dtype == "float32" and sharding.mesh_shape()[1] == 1:
    return variables  # As they are.
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
  """The mean of the weights of several variables, with the shardings of the first."""
  shardings = jax.tree.map(lambda x: x.sharding, trees[0])
  average = lambda *trees: jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
  return jax.jit(average, out_shardings=shardings)(*trees)


def extrapolate(sft: Any, ref: Any, alpha: float) -> Any:
  """theta_sft + alpha (theta_sft - theta_ref): a control that needs no training.

  With LoRA it moves the two factors of each adapter; a frozen base stays as it is.
  """
  shardings = jax.tree.map(lambda x: x.sharding, sft)

  def combine(sft, ref):
    def leaf(a, b):
      a32 = a.astype(jnp.float32)
      return (a32 + alpha * (a32 - b.astype(jnp.float32))).astype(a.dtype)

    return jax.tree.map(leaf, sft, ref)

  return jax.jit(combine, out_shardings=shardings)(sft, ref)
