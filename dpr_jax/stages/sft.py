"""Stage `sft`: fine-tuning on demonstrations, keeping milestones; stage `ref`: half_data's run."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.rewards.references import milestone_steps, reference_steps
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.steps import make_sft_step


def _fine_tune(run: Run, name: str, rows: PackedRows, steps: int, keep_steps=()) -> None:
  section = dataclasses.replace(run.config.sft, steps=steps)
  if run.finished(name, steps):
    return
  step, optimizer = make_sft_step(run.model, run.config.model, section, run.mesh)
  train(
      run,
      name,
      section,
      step,
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
