"""The same decoder with its layers one after the other, for decoding on a CPU or a GPU.

A scan over stacked layers slices each weight out of its stack before it multiplies. That is
nothing beside the product of a whole row, but when a step has one token a row, it moves as many
bytes again as the step needs at least. Unrolled, every layer has arrays of its own, sliced once
before the loop over tokens, and a GPU is given whole steps to run (as CUDA graphs) in place of one
layer at a time: docs/performance.md has what it gives. It costs compile time, and on a TPU it was
not measured: there the scan stays.
"""

import dataclasses
from typing import Any

import jax

from dpr_jax.models.attention import target_platform
from dpr_jax.models.cache import Cache
from dpr_jax.models.config import ModelConfig
from dpr_jax.models.transformer import Transformer


def decoder_of(model: Any) -> Any:
  """The model to decode with: `model` itself on a TPU or where it is another, else unrolled.

  Its variables are those of `split_variables`, its caches those of `split_cache`.
  """
  if not isinstance(model, Transformer) or target_platform() == "tpu":
    return model
  return Transformer(dataclasses.replace(model.cfg, scan_layers=False))


def split_variables(cfg: ModelConfig, variables: Any) -> Any:
  """Variables of a model of `cfg` -> those of the same model with scan_layers=False."""
  if not cfg.scan_layers:
    return variables

  def split(tree):
    rest = {name: x for name, x in tree.items() if not name.startswith("group_")}
    layers = []
    for g, (_, repeats) in enumerate(cfg.groups):
      layers += _split(tree.get(f"group_{g}", {}), repeats)
    return {**rest, **{f"group_{i}": layer for i, layer in enumerate(layers)}}

  return {name: split(tree) for name, tree in variables.items()}


def split_cache(cfg: ModelConfig, cache: Cache) -> Cache:
  """A cache of a model of `cfg` -> that of the same model with scan_layers=False."""
  if not cfg.scan_layers:
    return cache
  kv = []
  for group, (_, repeats) in zip(cache.kv, cfg.groups, strict=True):
    layer = lambda r, group=group: jax.tree.map(lambda x: x[r], group)
    kv += [group] if repeats == 1 else [layer(r) for r in range(repeats)]
  return cache.replace(kv=tuple(kv))


def _split(tree: Any, repeats: int) -> list[Any]:
  """[R, ...] leaves -> R trees of [1, ...] leaves."""
  return [jax.tree.map(lambda x, r=r: x[r : r + 1], tree) for r in range(repeats)]
