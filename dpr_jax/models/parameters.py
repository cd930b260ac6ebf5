"""Creation of parameters with logical axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def parameter(
    module: nn.Module, name: str, init, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
  """Creates a float32 parameter of `module` with its logical axes (see `sharding.RULES`).

  Args:
    init: (key, shape, dtype) -> values.
  """
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
