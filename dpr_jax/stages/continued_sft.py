"""Stage `continued_sft`: the control of DPR, more SFT on the same budget."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import pack
from dpr_jax.data.templates import encode_demo
from dpr_jax.losses import make_sft_loss
from dpr_jax.stages.context import Run, train
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def continued_sft_stage(run: Run) -> None:
  """The control: SFT for as many steps, sequences, tokens and at the learning rate of DPR.

  A step takes one demonstration a row for each of DPR's rollouts, on the same prompts, its
  response cut where a rollout would be; so both train on about as many tokens (the report has
  the counts).
  """
  section, data = run.config.dpr, run.config.data
  if not section.steps or run.finished("continued_sft", section.steps):
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_sft_loss(run.model, chunk_size=run.config.model.chunk_size)
  examples = [
      encode_demo(demo, run.tokenizer, "last", data.template) for demo in run.data.prompts.demos
  ]
  longest = data.prompt_length + section.max_new_tokens
  examples = [
      dataclasses.replace(
          e,
          tokens=e.tokens[: len(p) + section.max_new_tokens],
          loss_mask=e.loss_mask[: len(p) + section.max_new_tokens],
      )
      for e, p in zip(examples, run.data.prompts.tokens, strict=True)
  ]
  rows = pack(examples, longest, packed=False)
  train(
      run,
      "continued_sft",
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      # Another order than SFT's, which has just seen these demonstrations.
      sft_batches(rows, section.batch_size, run.config.seed + 1),
      run.sft_float32,
  )
