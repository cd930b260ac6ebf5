"""Methods that train on demonstrations: a loss is all that a new one declares.

A step takes one demonstration per row, on the training prompts of the rollouts and on as many rows,
its response cut where a rollout would be; so all methods of one budget train on about as many
tokens (the report has the counts).
"""

import dataclasses
from typing import Any

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.templates import Example, encode_demo
from dpr_jax.methods.base import TrainedMethod, make_step, make_training, row_batch
from dpr_jax.methods.programs import Program, TrainWork
from dpr_jax.training.steps import LossFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoMethod(TrainedMethod):
  """Trains on demonstrations with `loss`."""

  def loss(self, model: Any) -> LossFn:
    """loss_fn(variables, batch: SFTBatch, rng) -> (loss_sum, weight, metrics)."""
    raise NotImplementedError

  def build(self, run, name):
    budget = self.budget(run.config)
    step = make_step(self.loss(run.model), budget)
    # Another order than SFT's, which has just seen these demonstrations.
    rows = unpacked_rows(run, budget.max_new_tokens)
    batches = sft_batches(rows, budget.batch_size, run.config.seed + 1)
    return make_training(run, name, step, step.optimizer, batches, run.sft_float32)

  def programs(self, shapes, name):
    budget = self.budget(shapes.config)
    step = make_step(self.loss(shapes.model), budget)
    tokens = shapes.config.data.prompt_length + budget.max_new_tokens
    state, batch = shapes.state(step), row_batch(shapes, budget.batch_size, tokens)
    work = TrainWork(budget.batch_size, tokens, tokens - 1, budget.accumulation)
    return [
        Program(f"{name}/train_step", lambda: step.lower(state, batch), work,
                tokens=budget.batch_size * budget.max_new_tokens)
    ]


def unpacked_rows(run: Any, max_new_tokens: int) -> PackedRows:
  """The demonstrations of the training prompts, one per row, in the order of the prompts."""

  def cut(example: Example, prompt) -> Example:
    end = len(prompt) + max_new_tokens
    return dataclasses.replace(
        example, tokens=example.tokens[:end], loss_mask=example.loss_mask[:end]
    )

  data = run.config.data
  examples = [
      cut(encode_demo(demo, run.tokenizer, "last"), prompt)
      for demo, prompt in zip(run.data.prompts.demos, run.data.prompts.tokens, strict=True)
  ]
  return pack(examples, data.prompt_length + max_new_tokens, packed=False)
