"""One step of Dense-Path REINFORCE: sample and score, weigh, update.

    dpr_step(state, prompts) -> (state, metrics)

has the shape of every other step, so `run_stage` trains it like SFT. What it carries beside the
optimizer (an adaptive beta, the moving mean of the KL) is in `state.control`, and so in every
checkpoint.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpr_jax.errors import StageEnded
from dpr_jax.losses.reinforce import reinforce_batch
from dpr_jax.rewards.control import next_control
from dpr_jax.rollout.monitors import rollout_metrics


def make_dpr_step(
    rollout_step: Callable,
    train_step: Callable,
    *,
    sft: Any,
    ref: Any,
    rng: jax.Array,
    beta: float,
    target_kl: float = 0.0,
    beta_gain: float = 0.1,
    kl_budget: float = 0.0,
    verify: Callable[[int, Any], jax.Array] | None = None,
    verifier_weight: float = 0.0,
    **advantages: Any,
) -> Callable:
  """Returns dpr_step(state, prompts) -> (state, metrics).

  Args:
    rollout_step: from `rollout.make_rollout_step`.
    train_step: from `training.make_train_step` with `losses.make_reinforce_loss`.
    sft, ref: variables of the frozen models, in the compute dtype.
    rng: root of the sampling keys, one a step; not the state's own, which the loss uses.
    beta: weight of the KL to SFT; with `target_kl` that of the first step.
    target_kl, beta_gain: nats a response, and the gain of `rewards.control.next_beta`; 0 keeps
      beta.
    kl_budget: nats a response; where the moving mean of the sampled KL exceeds it, `StageEnded` is
      raised in the place of the update. 0: never. It makes the host wait for each rollout.
    verify: (step, rollout) -> float32 [B] scores of the responses; runs on the host between
      rollout and update.
    verifier_weight: share of those scores in the reward.
    advantages: other keywords of `losses.reinforce.reinforce_batch`.

  A state to train needs `control=initial_control(...)` if `target_kl` or `kl_budget` is set.
  """

  @jax.jit
  def weigh(rollout, beta, external):
    batch, metrics = reinforce_batch(
        rollout, beta=beta, external=external, external_weight=verifier_weight, **advantages
    )
    metrics = {**rollout_metrics(rollout), **metrics, "beta": jnp.float32(beta)}
    if external is not None:
      rows = rollout.lengths > 0
      total = jnp.sum(jnp.where(rows, external, 0.0))
      metrics["verifier_score"] = total / jnp.maximum(jnp.sum(rows), 1)
    return batch, metrics

  steer = jax.jit(functools.partial(next_control, target_kl=target_kl, beta_gain=beta_gain))

  def dpr_step(state, prompts):
    rollout = rollout_step(state.variables, sft, ref, prompts, jax.random.fold_in(rng, state.step))
    external = None if verify is None else verify(int(state.step), rollout)
    batch, metrics = weigh(rollout, state.control.get("beta", beta), external)
    control = steer(state.control, metrics["kl"]) if state.control else {}
    if kl_budget:
      metrics["kl_mean"] = control["kl_mean"]
      mean = float(control["kl_mean"])  # The same number in every process, so all of them stop.
      if mean > kl_budget:
        raise StageEnded(
            f"the mean sampled KL to SFT reached {mean:.3g} nats a response, beyond the budget of "
            f"{kl_budget:g} (config.dpr.kl_budget)"
        )
    state, trained = train_step(state.replace(control={}), batch)
    return state.replace(control=control), {**metrics, **trained}

  # A width of prompts is a program; there are few (see data.loader.prompt_width).
  dpr_step.compilations = lambda: rollout_step._cache_size() + train_step.compilations()
  return dpr_step
