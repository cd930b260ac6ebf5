"""Stage `dpr`: Dense-Path REINFORCE from the last SFT checkpoint; and its ablations.

An ablation differs from DPR in one field: its return (`sentence_level`), or its reward
(`endogenous`, `log_likelihood`: no reference).
"""

import dataclasses

from dpr_jax.rewards import transforms
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.steps import make_reinforce_step, make_rollout, rollout_prompts
from dpr_jax.training.dpr_step import make_dpr_step


def _reinforce(run: Run, name: str, **changes) -> None:
  section = dataclasses.replace(run.config.dpr, **changes)
  if not section.steps or run.finished(name, section.steps):
    return
  rollout_step = make_rollout(run.model, run.config.model, section, run.mesh, run.stop_ids)
  reinforce_step, optimizer = make_reinforce_step(run.model, run.config.model, section, run.mesh)
  dpr_step = make_dpr_step(
      rollout_step,
      reinforce_step,
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
  batches = rollout_prompts(run.config, section, run.data.prompts.tokens)
  train(run, name, section, dpr_step, optimizer, batches, run.sft_float32)


def dpr_stage(run: Run) -> None:
  _reinforce(run, "dpr")


def sentence_level_stage(run: Run) -> None:
  _reinforce(run, "sentence_level", returns="full_return")


def endogenous_stage(run: Run) -> None:
  _reinforce(run, "endogenous", reward="endogenous")


def log_likelihood_stage(run: Run) -> None:
  _reinforce(run, "log_likelihood", reward="log_likelihood")
