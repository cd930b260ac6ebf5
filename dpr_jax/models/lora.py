"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B.

A and B form a variable collection of their own, `variables = {"params": ..., "lora": ...}`.
Policy, sft and ref are then three adapters of one base model; a model applied without "lora"
is the base. B is initialised to zero, so a new adapter does not change the model.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Size of the adapters and the projections that have one."""

  rank: int = 0  # 0 means no adapters.
  alpha: float = 16.0  # the adapter's output is scaled by alpha / rank.
  targets: tuple[str, ...] = TARGETS  # names of projections.
  dropout: float = 0.0  # rate, applied to the adapter's input in training.

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    if self.rank < 0 or not 0 <= self.dropout < 1:
      raise ValueError(f"rank={self.rank} must be >= 0 and dropout={self.dropout} in [0, 1)")
    if not set(self.targets) <= set(TARGETS):
      raise ValueError(f"targets={self.targets}: each is one of {', '.join(TARGETS)}")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def _uniform_fan_in(n_in: int):
  """Uniform in +-1 / sqrt(fan_in), PEFT's initialisation of A (Kaiming with a = sqrt(5))."""

  def init(key, shape, dtype=jnp.float32):
    bound = 1.0 / math.sqrt(math.prod(shape[:n_in]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def adapter(
    module: nn.Module, config: LoRA, x: jax.Array, in_axes: tuple[str | None, ...],
    out_axes: tuple[str | None, ...], out_shape: tuple[int, ...], dtype: Any,
) -> jax.Array | None:
  """Returns the adapter's term [..., out dims] of `module`'s output, or None without an adapter.

  Called from `Projection`, at initialisation also to create the variables: a [in dims, rank] and
  b [rank, out dims]. The number of in dims and out dims varies, so names have no shape suffixes.

  Args:
    x: [..., in dims].
  """
  if not config.rank or module.name not in config.targets:
    return None
  if not (module.is_initializing() or module.has_variable("lora", "a")):
    return None
  n_in = len(in_axes)
  in_shape = x.shape[-n_in:]

  def variable(name, init, axes, shape):
    make = nn.with_logical_partitioning(init, axes)
    value = module.variable("lora", name, lambda: make(module.make_rng("lora"), shape)).value
    return nn.meta.unbox(value).astype(dtype)

  a = variable("a", _uniform_fan_in(n_in), in_axes + (None,), in_shape + (config.rank,))
  b = variable("b", nn.initializers.zeros, (None,) + out_axes, (config.rank,) + out_shape)
  if config.dropout and module.has_rng("dropout"):
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - config.dropout, x.shape)
    x = jnp.where(keep, x / (1 - config.dropout), 0).astype(x.dtype)
  contract = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in)))
  down = jax.lax.dot_general(x, a, (contract, ((), ())))
  up = jax.lax.dot_general(down, b, (((down.ndim - 1,), (0,)), ((), ())))
  return up * jnp.asarray(config.scale, dtype)


def merge(variables: Mapping[str, Any], config: LoRA) -> dict[str, Any]:
  """Merges the adapters into the weights of a model without adapters that computes the same.

  Kernels become W + (alpha / rank) A B, computed in float32 and stored in the base's dtype.
  Dims: R repeats of the scan, I inputs, O outputs, r rank.
  """
  if "lora" not in variables:
    return dict(variables)

  def walk(params, lora):
    if "a" in lora:  # A projection.
      a, b, kernel = lora["a"], lora["b"], params["kernel"]
      a_RxIxr = a.reshape(a.shape[0], -1, a.shape[-1]).astype(jnp.float32)
      b_RxrxO = b.reshape(b.shape[0], b.shape[1], -1).astype(jnp.float32)
      delta_RxIxO = jnp.einsum("rik,rko->rio", a_RxIxr, b_RxrxO, precision="highest")
      merged = kernel.astype(jnp.float32) + config.scale * delta_RxIxO.reshape(kernel.shape)
      return {**params, "kernel": merged.astype(kernel.dtype)}
    return {k: walk(v, lora[k]) if k in lora else v for k, v in params.items()}

  shardings = jax.tree.map(lambda x: x.sharding, variables["params"])
  join = jax.jit(lambda v: walk(v["params"], v["lora"]), out_shardings=shardings)
  return {"params": join(dict(variables))}


def split_trainable(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trainable, frozen): adapters and the frozen base, or all parameters and nothing."""
  if "lora" in variables:
    return {"lora": variables["lora"]}, {"params": variables["params"]}
  return {"params": variables["params"]}, {}
