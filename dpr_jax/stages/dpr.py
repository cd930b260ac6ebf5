"""Stage `dpr`: Dense-Path REINFORCE from the last SFT checkpoint; and its ablations.

An ablation differs from DPR in one field: its return (`sentence_level`), or its reward
(`endogenous`, `log_likelihood`: no reference).
"""

import dataclasses

from dpr_jax.data.loader import prompt_batches
from dpr_jax.losses import make_reinforce_loss
from dpr_jax.rewards import transforms
from dpr_jax.rollout import Sampling, make_rollout_step
from dpr_jax.stages.context import Run, train
from dpr_jax.training import make_train_step
from dpr_jax.training.dpr_step import make_dpr_step
from dpr_jax.training.optimizer import make_optimizer


def _reinforce(run: Run, name: str, **changes) -> None:
  section = dataclasses.replace(run.config.dpr, **changes)
  if not section.steps or run.finished(name, section.steps):
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  rollout_step = make_rollout_step(
      run.model,
      max_new_tokens=section.max_new_tokens,
      stop_ids=run.stop_ids,
      sampling=Sampling(section.temperature, section.top_k, section.top_p),
      reward=section.reward,
      chunk_size=run.chunk_size(section.batch_size),
      samples_per_prompt=section.samples_per_prompt,
      slots=section.slots,
  )
  loss_fn = make_reinforce_loss(
      run.model,
      normaliser=section.normaliser,
      chunk_size=run.chunk_size(section.batch_size // section.accumulation),
  )
  dpr_step = make_dpr_step(
      rollout_step,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      sft=run.load("sft"),
      ref=run.load("ref"),
      rng=run.rng(f"{name}/rollouts"),
      beta=section.beta,
      beta_ref=section.beta_ref,
      gamma=section.gamma,
      returns=section.returns,
      baseline=section.baseline,
      group_size=section.samples_per_prompt,
      truncated=section.truncated,
      transform=transforms.clip(-section.clip, section.clip) if section.clip else None,
  )
  batches = prompt_batches(
      run.data.prompts.tokens,
      section.batch_size // section.samples_per_prompt,
      run.config.data.prompt_length,
      run.config.seed,
  )
  train(run, name, section, dpr_step, optimizer, batches, run.sft_float32)


def dpr_stage(run: Run) -> None:
  _reinforce(run, "dpr")


def sentence_level_stage(run: Run) -> None:
  _reinforce(run, "sentence_level", returns="full_return")


def endogenous_stage(run: Run) -> None:
  _reinforce(run, "endogenous", reward="endogenous")


def log_likelihood_stage(run: Run) -> None:
  _reinforce(run, "log_likelihood", reward="log_likelihood")
