"""A shallower model out of the layers of a deep one: where a small student starts.

The layers are spaced evenly, the first and the last among them, as DistilBERT takes every other
layer of its teacher (arXiv 1910.01108, section 3).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dpr_jax.errors import UserError
from dpr_jax.models.config import ModelConfig


def kept_layers(num_layers: int, keep: int) -> tuple[int, ...]:
  """Indices of `keep` of `num_layers` layers, evenly spaced, from the first to the last."""
  return tuple(round(i * (num_layers - 1) / (keep - 1)) for i in range(keep))


def pruned_config(cfg: ModelConfig, keep: int) -> ModelConfig:
  """The config with `keep` layers; 0 is the config itself.

  Raises:
    UserError: `keep` is 1 or exceeds the layers that there are, or the layers differ in kind.
  """
  if not keep:
    return cfg
  if not 2 <= keep <= cfg.num_layers:
    raise UserError(f"config.model.keep_layers={keep} must be at least 2 and at most "
                    f"{cfg.num_layers}, the layers of the model; 0 keeps all")
  if len(cfg.layer_pattern) > 1:
    raise UserError(
        f"config.model.keep_layers={keep}: the layers of this model differ in what they see "
        f"({', '.join(cfg.layer_pattern)}), and that pattern would be lost; use 0, which keeps all"
    )
  return dataclasses.replace(cfg, num_layers=keep)


def pruned_params(params: dict[str, Any], cfg: ModelConfig, keep: int) -> dict[str, Any]:
  """Those of `pruned_config(cfg, keep)`: rows of the stacked layers, all else as it is.

  Args:
    params: of `Transformer(cfg)`, its layers scanned in one group.
  """
  if not keep:
    return params
  rows = np.asarray(kept_layers(cfg.num_layers, keep))
  group = params["group_0"]
  shardings = jax.tree.map(lambda x: x.sharding, group)
  pick = jax.jit(lambda tree: jax.tree.map(lambda x: x[rows], tree), out_shardings=shardings)
  return {**params, "group_0": pick(group)}
