"""Stage `sft`: fine-tuning on demonstrations, keeping milestones, of which ref is made."""

from dpr_jax.data.loader import sft_batches
from dpr_jax.losses import make_sft_loss
from dpr_jax.rewards.references import milestone_steps
from dpr_jax.stages.context import Run, process_block, train
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def sft_stage(run: Run) -> None:
  section = run.config.sft
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_sft_loss(run.model, chunk_size=run.config.model.chunk_size)
  train(
      run,
      "sft",
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      sft_batches(run.data.rows, section.batch_size, run.config.seed, **process_block()),
      lambda: run.initial_variables("float32"),
      keep_steps=tuple(milestone_steps(section.milestones, section.steps).values()),
  )
