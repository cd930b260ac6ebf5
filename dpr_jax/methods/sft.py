"""Supervised fine-tuning, where every method starts; keeps milestones, maybe a moving average."""

import dataclasses
from typing import Any

from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.base import make_step, make_training, row_batch, train_stage
from dpr_jax.methods.programs import Program, Shapes, TrainWork


def fine_tune(
    run: Any, name: str, rows: PackedRows, steps: int, keep_steps: tuple[int, ...] = (),
    ema_decay: float = 0.0,
) -> None:
  """Trains from the initial variables on `rows` as config.sft says, but for `steps`."""
  section = dataclasses.replace(run.config.sft, steps=steps, milestones=())

  def build():
    step = make_step(make_sft_loss(run.model), section, ema_decay)
    batches = sft_batches(rows, section.batch_size, run.config.seed)
    start = lambda: run.initial_variables("float32")
    return make_training(run, name, step, step.optimizer, batches, start)

  train_stage(run, name, steps, build, keep_steps)


def sft_stage(run: Any) -> None:
  """The stage `sft` of a run."""
  config = run.config
  kept = tuple(config.sft.milestone_steps().values())
  fine_tune(run, "sft", run.data.rows, config.sft.steps, kept, config.reference.ema_decay)


def sft_programs(shapes: Shapes) -> list[Program]:
  """What the stage compiles."""
  section, tokens = shapes.config.sft, shapes.config.data.row_length
  decay = shapes.config.reference.ema_decay
  step = make_step(make_sft_loss(shapes.model), section, decay)
  state, batch = shapes.state(step), row_batch(shapes, section.batch_size, tokens)
  work = TrainWork(section.batch_size, tokens, tokens - 1, section.accumulation, decay > 0)
  return [
      Program("sft/train_step", lambda: step.lower(state, batch), work,
              tokens=section.batch_size * tokens)
  ]
