"""One step of Dense-Path REINFORCE: sample and score, compute advantages, update.

    dpr_step(state, prompts) -> (state, metrics)

has the shape of every other step, so the loop trains it like SFT. What it carries beside the
optimizer (an adaptive beta, the moving mean of the KL) is in `state.control`, and so in every
checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpr_jax.errors import StageEnded
from dpr_jax.rewards.control import KLControl
from dpr_jax.rollout.monitors import rollout_metrics
from dpr_jax.training.steps import TrainState, TrainStep, abstract_state


@dataclasses.dataclass(frozen=True)
class DPRStep:
  """See the module docstring."""

  rollout_step: Callable  # from `rollout.make_rollout_step`.
  train_step: TrainStep  # with a loss over the batches of `make_batch`.
  # (rollout, *, beta) -> (batch, metrics): the advantages; with `verify` also `external`.
  make_batch: Callable
  control: KLControl
  sft: Any  # variables of the frozen models, in the compute dtype.
  ref: Any
  rng: jax.Array  # root of the sampling keys, one per step; not the state's own.
  # (step, rollout) -> float32 [B] scores of the responses, NaN for none, mixed into the reward by
  # `make_batch`; runs on the host between rollout and update.
  verify: Callable[[int, Any], jax.Array] | None = None
  # (batch, rollout, sft, ref) -> the batch of a loss that reads sft and ref as well.
  attach: Callable[[Any, Any, Any, Any], Any] | None = None

  def init(self, variables, rng, frozen=None) -> TrainState:
    return TrainState.create(
        variables, self.train_step.optimizer, rng, frozen, control=self.control.initial()
    )

  def abstract(self, variables, rng) -> TrainState:
    return abstract_state(
        variables, self.train_step.optimizer, rng, control=self.control.initial()
    )

  def __call__(self, state: TrainState, prompts: Any):
    key = jax.random.fold_in(self.rng, state.step)
    rollout = self.rollout_step(state.variables, self.sft, self.ref, prompts, key)
    external = None if self.verify is None else self.verify(int(state.step), rollout)
    beta = state.control.get("beta", self.control.beta)
    batch, metrics = self._advantages(rollout, beta, external)
    control = self._next_control(state.control, metrics["kl"]) if state.control else {}
    if self.control.kl_budget:
      metrics["kl_mean"] = control["kl_mean"]
      mean = float(control["kl_mean"])  # The same number in every process, so all of them stop.
      if mean > self.control.kl_budget:
        raise StageEnded(
            f"the mean sampled KL to SFT reached {mean:.3g} nats per response, beyond kl_budget="
            f"{self.control.kl_budget:g}"
        )
    if self.attach is not None:
      batch = self.attach(batch, rollout, self.sft, self.ref)
    state, trained = self.train_step(state.replace(control={}), batch)
    return state.replace(control=control), {**metrics, **trained}

  @functools.cached_property
  def _advantages(self):
    @jax.jit
    def advantages(rollout, beta, external):
      given = {} if external is None else {"external": external}
      batch, metrics = self.make_batch(rollout, beta=beta, **given)
      metrics = {**rollout_metrics(rollout), **metrics, "beta": jnp.float32(beta)}
      if external is not None:
        rows, scored = rollout.lengths > 0, jnp.isfinite(external)
        mean = lambda x, on: jnp.sum(jnp.where(on, x, 0.0)) / jnp.maximum(jnp.sum(on), 1)
        metrics["verifier_score"] = mean(external, rows & scored)
        metrics["verifier_unscored"] = mean(~scored, rows)
      return batch, metrics

    return advantages

  @functools.cached_property
  def _next_control(self):
    return jax.jit(self.control.next)

  def compilations(self) -> int:
    """Programs of rollout and update that were compiled; each width of prompts is one."""
    return self.rollout_step._cache_size() + self.train_step.compilations()

