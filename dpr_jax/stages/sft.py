"""Stage `sft`: fine-tuning on demonstrations, keeping milestones and maybe a moving average."""

import dataclasses

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.losses import make_sft_loss
from dpr_jax.rewards.references import milestone_steps
from dpr_jax.stages.context import Run, train
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


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
  optimizer = make_optimizer(section.optimizer, steps)
  chunk_size = run.chunk_size(section.batch_size // section.accumulation)
  loss_fn = make_sft_loss(run.model, chunk_size=chunk_size)
  train(
      run,
      name,
      section,
      make_train_step(
          loss_fn, optimizer, accumulation=section.accumulation, ema_decay=ema_decay
      ),
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
