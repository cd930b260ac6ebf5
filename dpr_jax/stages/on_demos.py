"""Baselines that train on demonstrations, on the budget of DPR: continued SFT, DFT, IQ-LM.

Each starts at the last SFT checkpoint and makes as many steps as DPR, with its optimizer. A
step takes one demonstration a row for each of DPR's rollouts, on the same prompts, its response
cut where a rollout would be; so all train on about as many tokens (the report has the counts).
"""

import dataclasses
from collections.abc import Callable

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.templates import Example, encode_demo
from dpr_jax.losses import make_dft_loss, make_iq_lm_loss, make_sft_loss
from dpr_jax.stages.context import Run, train
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def unpacked_rows(run: Run) -> PackedRows:
  """The demonstrations of the training prompts, one a row, in the order of the prompts."""
  new = run.config.dpr.max_new_tokens

  def cut(example: Example, prompt) -> Example:
    end = len(prompt) + new
    return dataclasses.replace(
        example, tokens=example.tokens[:end], loss_mask=example.loss_mask[:end]
    )

  template = run.config.data.template
  examples = [
      cut(encode_demo(demo, run.tokenizer, "last", template), prompt)
      for demo, prompt in zip(run.data.prompts.demos, run.data.prompts.tokens, strict=True)
  ]
  return pack(examples, run.config.data.prompt_length + new, packed=False)


def _chunk_size(run: Run) -> int:
  return run.chunk_size(run.config.dpr.batch_size // run.config.dpr.accumulation)


def _train_on_demos(run: Run, name: str, loss_fn: Callable) -> None:
  section = run.config.dpr
  if not section.steps or run.finished(name, section.steps):
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  train(
      run,
      name,
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      # Another order than SFT's, which has just seen these demonstrations.
      sft_batches(unpacked_rows(run), section.batch_size, run.config.seed + 1),
      run.sft_float32,
  )


def continued_sft_stage(run: Run) -> None:
  """The control that DPR must beat: more of the same."""
  loss_fn = make_sft_loss(run.model, chunk_size=_chunk_size(run))
  _train_on_demos(run, "continued_sft", loss_fn)


def dft_stage(run: Run) -> None:
  loss_fn = make_dft_loss(run.model, chunk_size=_chunk_size(run))
  _train_on_demos(run, "dft", loss_fn)


def iq_lm_stage(run: Run) -> None:
  loss_fn = make_iq_lm_loss(
      run.model, lam=run.config.baseline.iq_lambda, chunk_size=_chunk_size(run)
  )
  _train_on_demos(run, "iq_lm", loss_fn)
