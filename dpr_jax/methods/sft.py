"""Supervised fine-tuning, where every method starts; keeps milestones, maybe a moving average."""

from collections.abc import Callable
from typing import Any

from dpr_jax.config.sections import Budget, SFTSection
from dpr_jax.data.loader import sft_batches
from dpr_jax.data.packing import PackedRows
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.base import make_step, make_training, row_batch, train_stage
from dpr_jax.methods.programs import Program, Shapes, TrainWork
from dpr_jax.training.loop import Training


def fine_tune(
    run: Any, name: str, rows: Callable[[], PackedRows], section: Budget | SFTSection,
    keep_steps: tuple[int, ...] = (), ema_decay: float = 0.0,
) -> None:
  """Trains from the initial variables on what `rows` returns, unless the stage is finished."""
  build = fine_tuning(run, name, rows, section, ema_decay)
  train_stage(run, name, section.steps, build, keep_steps)


def fine_tuning(
    run: Any, name: str, rows: Callable[[], PackedRows], section: Budget | SFTSection,
    ema_decay: float = 0.0,
) -> Callable[[], Training]:
  """What makes the training of such a stage."""

  def build():
    step = make_step(make_sft_loss(run.model), section, ema_decay)
    batches = sft_batches(rows(), section.batch_size, run.config.seed)
    start = lambda: run.initial_variables("float32")
    return make_training(run, name, step, step.optimizer, batches, start)

  return build


def sft_stage(run: Any) -> None:
  """The stage `sft` of a run."""
  config = run.config
  kept = tuple(config.sft.milestone_steps().values())
  fine_tune(run, "sft", lambda: run.data.rows, config.sft, kept, config.reference.ema_decay)


def sft_programs(
    shapes: Shapes, name: str = "sft", section: Budget | SFTSection | None = None
) -> list[Program]:
  """What the stage compiles, or another that trains as it does."""
  section, tokens = section or shapes.config.sft, shapes.config.data.row_length
  decay = shapes.config.reference.ema_decay if name == "sft" else 0.0
  step = make_step(make_sft_loss(shapes.model), section, decay)
  state, batch = shapes.state(step), row_batch(shapes, section.batch_size, tokens)
  work = TrainWork(section.batch_size, tokens, tokens - 1, section.accumulation, decay > 0)
  return [
      Program(f"{name}/train_step", lambda: step.lower(state, batch), work,
              tokens=section.batch_size * tokens)
  ]
