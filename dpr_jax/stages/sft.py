"""Stage `sft`: fine-tuning on demonstrations, keeping milestones and maybe a moving average."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.rewards.references import milestone_steps
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.steps import ema_decay, make_sft_step


def fine_tune(
    run: Run,
    name: str,
    rows: PackedRows,
    steps: int,
    keep_steps: tuple[int, ...] = (),
    decay: float = 0.0,
) -> None:
  """Trains from the initial variables on `rows`, with config.sft but for `steps`.

  Args:
    decay: of a moving average of the weights, which is kept as well; 0 keeps none.
  """
  section = dataclasses.replace(run.config.sft, steps=steps)
  if run.finished(name, steps):
    return
  step, optimizer = make_sft_step(
      run.model, run.config.model, section, run.mesh, ema_decay=decay
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
      ema=decay > 0,
  )


def sft_stage(run: Run) -> None:
  section = run.config.sft
  kept = tuple(milestone_steps(section.milestones, section.steps).values())
  fine_tune(run, "sft", run.data.rows, section.steps, kept, ema_decay(run.config))
