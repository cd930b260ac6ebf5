"""AdamW with clipping and a schedule, from a config section."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpr_jax.config.sections import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by update, counted from 0: linear warm-up, then constant, cosine or linear decay.

  The warm-up reaches the peak at its last update; the decay starts from there and reaches
  final_fraction of the peak at update steps - 1, the last.
  """
  peak, end = config.learning_rate, config.learning_rate * config.final_fraction
  warmup = min(config.warmup_steps, steps)
  rest = max(steps - warmup - 1, 1)
  after = {
      "constant": lambda: optax.constant_schedule(peak),
      "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
      "linear": lambda: optax.linear_schedule(peak, end, rest),
  }[config.schedule]()
  if not warmup:
    return after
  # Counted from 1 / warmup, so that the first update is not lost to a rate of 0.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


class Optimizer(NamedTuple):
  """An `optax.GradientTransformation` that knows its learning rate by update."""

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  schedule: optax.Schedule


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` that multiplies each gradient instead of dividing it.

  XLA duplicates a multiplication into the updates of both moments, but computes a division once
  and so keeps another array of the size of all gradients.
  """

  def update(grads, state, params=None):
    del params
    factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
  """Global-norm clipping, then AdamW; no decay on norms and biases."""

  def decayed(params):
    def leaf(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      return not name.endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(leaf, params)

  schedule, transforms = make_schedule(config, steps), []
  if config.max_grad_norm:
    transforms.append(clip_by_global_norm(config.max_grad_norm))
  transforms.append(
      optax.adamw(
          schedule,
          b1=config.b1,
          b2=config.b2,
          eps=config.eps,
          weight_decay=config.weight_decay,
          mask=decayed,
      )
  )
  return Optimizer(*optax.chain(*transforms), schedule)
