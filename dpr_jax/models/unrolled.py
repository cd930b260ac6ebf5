"""The decoder with its layers unrolled instead of scanned, for decoding on a CPU or a GPU.

A scan over stacked layers slices each weight out of its stack before the matmul. That cost is
negligible for whole rows, but in a step with one token per row it doubles the bytes moved.
Unrolled, every layer has its own arrays, sliced once before the loop over tokens, and a GPU runs a
whole step (as a CUDA graph) instead of one layer at a time; docs/performance.md has the speedups.
Unrolling takes compile time, and it has not been measured on TPUs, which keep the scan.
"""

import dataclasses
from typing import Any

import jax

from dpr_jax.models.attention import target_platform
from dpr_jax.models.cache import Cache
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.transformer import Transformer


def decoder_of(model: Any) -> Any:
  """Returns the unrolled model; on a TPU, or if `model` is not a `Transformer`, `model` itself.

  The unrolled model takes variables from `split_variables` and caches from `split_cache`.
  """
  if not isinstance(model, Transformer) or target_platform() == "tpu":
    return model
  return Transformer(dataclasses.replace(model.cfg, scan_layers=False))


def split_variables(cfg: ModelConfig, variables: Any) -> Any:
  """Converts the variables of a model of `cfg` to those of its unrolled model."""
  if not cfg.scan_layers:
    return variables

  def split(tree):
    rest = {name: x for name, x in tree.items() if not name.startswith("group_")}
    layers = []
    for g, (_, repeats) in enumerate(cfg.groups):
      group = tree.get(f"group_{g}", {})  # Leaves [R, ...], of each layer [1, ...].
      layers += [jax.tree.map(lambda x, r=r: x[r : r + 1], group) for r in range(repeats)]
    return {**rest, **{f"group_{i}": layer for i, layer in enumerate(layers)}}

  return {name: split(tree) for name, tree in variables.items()}


def split_cache(cfg: ModelConfig, cache: Cache) -> Cache:
  """Converts a cache of a model of `cfg` to one of its unrolled model."""
  if not cfg.scan_layers:
    return cache
  kv = []
  for group, (_, repeats) in zip(cache.kv, cfg.groups, strict=True):
    layer = lambda r, group=group: jax.tree.map(lambda x: x[r], group)
    kv += [group] if repeats == 1 else [layer(r) for r in range(repeats)]
  return cache.replace(kv=tuple(kv))
