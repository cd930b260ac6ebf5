"""Stage `sft`: fine-tuning on demonstrations, keeping milestones; stage `ref`: half_data's run."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.losses import make_sft_loss
from dpr_jax.rewards.references import milestone_steps, reference_steps
from dpr_jax.stages.context import Run, train
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def _fine_tune(run: Run, name: str, rows: PackedRows, steps: int, keep_steps=()) -> None:
  section = dataclasses.replace(run.config.sft, steps=steps)
  if run.finished(name, steps):
    return
  optimizer = make_optimizer(section.optimizer, steps)
  chunk_size = run.chunk_size(section.batch_size // section.accumulation)
  loss_fn = make_sft_loss(run.model, chunk_size=chunk_size)
  train(
      run,
      name,
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      sft_batches(rows, section.batch_size, run.config.seed),
      lambda: run.initial_variables("float32"),
      keep_steps=keep_steps,
  )


def sft_stage(run: Run) -> None:
  section = run.config.sft
  kept = tuple(milestone_steps(section.milestones, section.steps).values())
  _fine_tune(run, "sft", run.data.rows, section.steps, kept)


def ref_stage(run: Run) -> None:
  """The `half_data` reference; nothing to do for `midrun`, a milestone of the SFT run."""
  reference = run.config.reference
  if reference.kind != "half_data":
    return
  rows = run.data.rows
  n = max(1, round(reference.fraction * len(rows)))  # Rows are in random order: any n are a sample.
  half = dataclasses.replace(
      rows,
      tokens=rows.tokens[:n],
      segment_ids=rows.segment_ids[:n],
      loss_mask=rows.loss_mask[:n],
  )
  _fine_tune(run, "ref", half, reference_steps(reference.fraction, run.config.sft.steps))
