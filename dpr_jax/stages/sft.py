"""Stage `sft`: fine-tuning on demonstrations, keeping milestones and maybe a moving average."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.rewards.references import milestone_steps
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.steps import make_sft_step


def fine_tune(
    run: Run,
    name: str,
    rows: PackedRows,
    steps: int,
    keep_steps: tuple[int, ...] = (),
    ema_decay: float = 0.0,
) -> None:
  """Trains from the initial variables on `rows`, with config.sft but for `steps`."""
  section = dataclasses.replace(run.config.sft, steps=steps)
  if run.finished(name, steps):
    return
  step, optimizer = make_sft_step(
      run.model, run.config.model, section, run.mesh, ema_decay=ema_decay
  )
  train(
      run,
      name,
      section,
      step,
      optimizer,
      sft_batches(rows, section.batch_size, run.config.seed),
      lambda: run.initial_variables("float32"),
      keep_steps=keep_steps,
      ema=ema_decay > 0,
  )


def sft_stage(run: Run) -> None:
  section = run.config.sft
  kept = tuple(milestone_steps(section.milestones, section.steps).values())
  reference = run.config.reference
  decay = reference.ema_decay if reference.kind == "ema" else 0.0
  fine_tune(run, "sft", run.data.rows, section.steps, kept, decay)
