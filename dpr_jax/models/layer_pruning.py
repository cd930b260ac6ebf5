"""Layer pruning: initialises a small student from evenly spaced layers of a larger model.

The first and the last layer are always kept. DistilBERT likewise starts from every other layer
of its teacher (arXiv 1910.01108, section 3).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models.config import ModelConfig


def kept_layers(num_layers: int, keep: int) -> tuple[int, ...]:
  """Returns the indices of `keep` evenly spaced layers, from the first to the last."""
  return tuple(round(i * (num_layers - 1) / (keep - 1)) for i in range(keep))


def pruned_config(cfg: ModelConfig, keep: int) -> ModelConfig:
  """Returns the config with `keep` layers; 0 keeps all layers.

  Raises:
    UserError: `keep` is 1 or exceeds `cfg.num_layers`, or the layers differ in kind.
  """
  if not keep:
    return cfg
  if not 2 <= keep <= cfg.num_layers:
    raise UserError(f"keep={keep} must be at least 2 and at most {cfg.num_layers}, the number of "
                    "layers of the model, or 0, which keeps all")
  if len(cfg.layer_pattern) > 1:
    raise UserError(f"keep={keep} would break the pattern of attention layers of this model "
                    f"({', '.join(cfg.layer_pattern)}); use 0, which keeps all layers")
  return dataclasses.replace(cfg, num_layers=keep)


def pruned_params(params: dict[str, Any], cfg: ModelConfig, keep: int) -> dict[str, Any]:
  """Selects the kept layers from the stacked parameters and leaves all others unchanged.

  Args:
    params: the parameters of `Transformer(cfg)`, whose layers are scanned in one group.

  Returns:
    The parameters of `Transformer(pruned_config(cfg, keep))`.
  """
  if not keep:
    return params
  rows = np.asarray(kept_layers(cfg.num_layers, keep))
  group = params["group_0"]
  shardings = jax.tree.map(lambda x: x.sharding, group)
  pick = jax.jit(lambda tree: jax.tree.map(lambda x: x[rows], tree), out_shardings=shardings)
  return {**params, "group_0": pick(group)}
