"""Methods that compare demonstrations with the model's own samples: a loss of a pair declares one.

One iteration: the samples come from the last SFT checkpoint, which stays the frozen iterate, and
where training starts. A step takes half as many pairs as the budget has rows, so that it trains on
about as many tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.batches import PromptBatch, SFTBatch
from dpr_jax.data.loader import Batches, pad_prompts
from dpr_jax.losses import generated_rows, make_pair_batch
from dpr_jax.losses.pairs import log_ratios, pair_metrics
from dpr_jax.methods.base import TrainedMethod, make_step, make_training, row_batch
from dpr_jax.methods.on_demos import unpacked_rows
from dpr_jax.methods.programs import Program, RolloutWork, TrainWork, device_bytes
from dpr_jax.rollout import generate
from dpr_jax.training.steps import LossFn, TrainStep


@dataclasses.dataclass(frozen=True)
class PairStep:
  """pair_step(state, (demos, prompts)) -> (state, metrics): sample, score, update."""

  make_pairs: Callable  # jitted (frozen, (demos, prompts), key) -> (PairBatch, trained tokens).
  train_step: TrainStep
  sft: Any  # variables of the frozen iterate.
  rng: jax.Array  # root of the sampling keys, one per step.

  def init(self, variables, rng, frozen=None):
    return self.train_step.init(variables, rng, frozen)

  def abstract(self, variables, rng):
    return self.train_step.abstract(variables, rng)

  def __call__(self, state, batch):
    pairs, tokens = self.make_pairs(self.sft, batch, jax.random.fold_in(self.rng, state.step))
    state, metrics = self.train_step(state, pairs)
    return state, {**metrics, "tokens": tokens}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairMethod(TrainedMethod):
  """Trains on pairs with `pair_losses`, or with a `loss` of another form."""

  def pair_losses(self, demo_B: jax.Array, generated_B: jax.Array) -> jax.Array:
    """float32 [B], of the log-ratios log pi - log pi_k of both responses of each pair, nats."""
    raise NotImplementedError

  def loss(self, model: Any) -> LossFn:
    """loss_fn(variables, batch: PairBatch, rng) -> (loss_sum, weight, metrics).

    loss_sum: summed over pairs; weight: their number. Metrics: see `losses.pairs.pair_metrics`.
    """

    def loss_fn(variables, batch, rng):
      demo_B, generated_B, on_B = log_ratios(model, variables, batch, rng)
      losses_B = self.pair_losses(demo_B, generated_B)
      metrics = pair_metrics(demo_B, generated_B, on_B)
      return jnp.sum(on_B * losses_B), jnp.sum(on_B), metrics

    return loss_fn

  def check(self, config):
    budget = self.budget(config)
    if budget.batch_size % (2 * budget.accumulation):
      raise ValueError(f"batch_size={budget.batch_size} does not give whole pairs in accumulation="
                       f"{budget.accumulation} micro-batches")

  def check_mesh(self, mesh, config):
    budget = self.budget(config)
    rows = budget.batch_size // budget.accumulation // 2
    sharding.check_rows(mesh, "batch_size / accumulation / 2", rows)

  def _steps(self, context):
    budget = self.budget(context.config)
    make_pairs = functools.partial(
        _make_pairs, context.model, budget.max_new_tokens, tuple(context.stop_ids)
    )
    return jax.jit(make_pairs), make_step(self.loss(context.model), budget)

  def build(self, run, name):
    budget = self.budget(run.config)
    make_pairs, train_step = self._steps(run)
    step = PairStep(make_pairs, train_step, run.sft(), run.rng(f"{name}/samples"))
    batches = _pair_batches(run, budget.batch_size // 2, budget.max_new_tokens)
    return make_training(run, name, step, train_step.optimizer, batches, run.sft_float32)

  def programs(self, shapes, name):
    budget, prompt = self.budget(shapes.config), shapes.config.data.prompt_length
    make_pairs, step = self._steps(shapes)
    pairs, new = budget.batch_size // 2, budget.max_new_tokens
    prompts = PromptBatch(
        tokens=np.zeros((pairs, prompt), np.int32), lengths=np.zeros((pairs,), np.int32)
    )
    batch = (row_batch(shapes, pairs, prompt + new), shapes.rows(prompts))
    arguments = (shapes.held, batch, shapes.abstract_key)
    state = shapes.state(step)

    def lower_update():
      made, _ = jax.eval_shape(make_pairs, *arguments)
      return step.lower(state, shapes.rows(made))

    # A demonstration and a sample per pair are scored under the frozen iterate.
    sampling = RolloutWork(rows=pairs, prompt=prompt, new=new, scored=2, held=1)
    tokens = prompt + new
    return [
        Program(f"{name}/make_pairs", lambda: make_pairs.lower(*arguments), sampling,
                device_bytes(state.opt_state) + device_bytes(state.trainable)),
        Program(f"{name}/train_step", lower_update,
                TrainWork(2 * pairs, tokens, tokens - 1, budget.accumulation, held=1),
                shapes.held_bytes(1)[0], tokens=2 * pairs * new),
    ]


def _make_pairs(model, max_new_tokens, stop_ids, frozen, batch, key):
  demos, prompts = batch
  sample = generate(
      model, (frozen,), prompts, key, max_new_tokens=max_new_tokens, stop_ids=stop_ids
  )
  generated = generated_rows(sample)
  tokens = demos.loss_mask.sum() + generated.loss_mask.sum()
  return make_pair_batch(model, frozen, demos, generated), tokens


def _pair_batches(run: Any, batch_size: int, max_new_tokens: int) -> Batches:
  """Batches of (demonstrations, prompts), row by row of the same prompt."""
  rows = unpacked_rows(run, max_new_tokens)
  prompts = pad_prompts(run.data.prompts.tokens, run.config.data.prompt_length)
  assert len(rows) == len(prompts.lengths)  # Every response has a token: none was left out.
  demos = SFTBatch(tokens=rows.tokens, segment_ids=rows.segment_ids, loss_mask=rows.loss_mask)
  gather = lambda index_B: jax.tree.map(lambda x: x[index_B], (demos, prompts))
  return Batches(gather, len(rows), batch_size, run.config.seed + 1)
