"""One step of Dense-Path REINFORCE: sample and score, weigh, update.

    dpr_step(state, prompts) -> (state, metrics)

has the shape of every other step, so `run_stage` trains it like SFT.
"""

from collections.abc import Callable
from typing import Any

import jax

from dpr_jax.losses.reinforce import reinforce_batch
from dpr_jax.rollout.monitors import rollout_metrics


def make_dpr_step(
    rollout_step: Callable,
    train_step: Callable,
    *,
    sft: Any,
    ref: Any,
    rng: jax.Array,
    **advantages: Any,
) -> Callable:
  """Returns dpr_step(state, prompts) -> (state, metrics).

  Args:
    rollout_step: from `rollout.make_rollout_step`.
    train_step: from `training.make_train_step` with `losses.make_reinforce_loss`.
    sft, ref: variables of the frozen models, in the compute dtype.
    rng: root of the sampling keys, one a step; not the state's own, which the loss uses.
    advantages: keywords of `losses.reinforce.reinforce_batch`.
  """

  @jax.jit
  def weigh(rollout):
    batch, metrics = reinforce_batch(rollout, **advantages)
    return batch, {**rollout_metrics(rollout), **metrics}

  def dpr_step(state, prompts):
    rollout = rollout_step(state.variables, sft, ref, prompts, jax.random.fold_in(rng, state.step))
    batch, metrics = weigh(rollout)
    state, trained = train_step(state, batch)
    return state, {**metrics, **trained}

  return dpr_step
