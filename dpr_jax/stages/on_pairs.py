"""Baselines that compare demonstrations with own samples, on the budget of DPR: SPIN, GSIL.

One iteration: the samples come from the last SFT checkpoint, which stays the frozen iterate, and
where training starts. A step takes half as many pairs as DPR has rollouts, so that it trains on
about as many tokens.
"""

from collections.abc import Callable

import jax
import numpy as np

from dpr_jax.data.batches import PromptBatch, SFTBatch
from dpr_jax.data.loader import Batches, pad_prompts
from dpr_jax.losses import generated_rows, make_gsil_loss, make_pair_batch, make_spin_loss
from dpr_jax.rollout import generate
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.on_demos import unpacked_rows
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def _pair_batches(run: Run, batch_size: int) -> Batches:
  """Batches of (demonstrations, prompts), row by row of the same prompt."""
  rows = unpacked_rows(run)
  prompts = pad_prompts(run.data.prompts.tokens, run.config.data.prompt_length)
  assert len(rows) == len(prompts.lengths)  # Every response has a token: none was left out.

  def gather(index_B: np.ndarray) -> tuple[SFTBatch, PromptBatch]:
    demos = SFTBatch(
        tokens=rows.tokens[index_B],
        segment_ids=rows.segment_ids[index_B],
        loss_mask=rows.loss_mask[index_B],
    )
    return demos, PromptBatch(tokens=prompts.tokens[index_B], lengths=prompts.lengths[index_B])

  return Batches(gather, len(rows), batch_size, run.config.seed + 1)


def _chunk_size(run: Run) -> int:
  return run.chunk_size(run.config.dpr.batch_size // 2 // run.config.dpr.accumulation)


def _train_on_pairs(run: Run, name: str, loss_fn: Callable) -> None:
  section, chunk_size = run.config.dpr, _chunk_size(run)
  if not section.steps or run.finished(name, section.steps):
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  train_step = make_train_step(loss_fn, optimizer, accumulation=section.accumulation)
  frozen, rng = run.load("sft"), run.rng(f"{name}/samples")

  @jax.jit
  def make_pairs(frozen, batch, key):
    demos, prompts = batch
    sample = generate(
        run.model,
        (frozen,),
        prompts,
        key,
        max_new_tokens=section.max_new_tokens,
        stop_ids=run.stop_ids,
    )
    generated = generated_rows(sample)
    tokens = demos.loss_mask.sum() + generated.loss_mask.sum()
    return make_pair_batch(run.model, frozen, demos, generated, chunk_size=chunk_size), tokens

  def pair_step(state, batch):
    pairs, tokens = make_pairs(frozen, batch, jax.random.fold_in(rng, state.step))
    state, metrics = train_step(state, pairs)
    return state, {**metrics, "tokens": tokens}

  batches = _pair_batches(run, section.batch_size // 2)
  train(run, name, section, pair_step, optimizer, batches, run.sft_float32)


def spin_stage(run: Run) -> None:
  loss_fn = make_spin_loss(
      run.model, beta=run.config.baseline.spin_beta, chunk_size=_chunk_size(run)
  )
  _train_on_pairs(run, "spin", loss_fn)


def gsil_stage(run: Run) -> None:
  section = run.config.baseline
  loss_fn = make_gsil_loss(
      run.model,
      kind=section.gsil_kind,
      alpha=section.gsil_alpha,
      chunk_size=_chunk_size(run),
  )
  _train_on_pairs(run, "gsil", loss_fn)
