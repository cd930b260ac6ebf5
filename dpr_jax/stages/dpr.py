"""Stage `dpr`: Dense-Path REINFORCE from the last SFT checkpoint; and its ablations.

An ablation is the same but for its return (`reward_to_go` as the paper has it, `sentence_level`) or
its reward (`log_likelihood`: no reference; `endogenous`, with the return that it needs). None but
`log_likelihood` is centred: it would have the expected gradient of returns per token.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.loader import Batches
from dpr_jax.evals.responses import response_text
from dpr_jax.evals.verifiers import get_verifier
from dpr_jax.rewards import transforms
from dpr_jax.rewards.control import initial_control
from dpr_jax.rollout import Rollout
from dpr_jax.stages.context import Run, train
from dpr_jax.stages.steps import make_reinforce_step, make_rollout, rollout_prompts, scoring_of
from dpr_jax.training.dpr_step import make_dpr_step

REINFORCED = ("reward_to_go", "sentence_level", "endogenous", "log_likelihood")  # The ablations.


def _make_verify(run: Run, batches: Batches) -> Callable[[int, Rollout], jax.Array]:
  """verify(step, rollout) -> the verifier's accuracy of each response, float32 [B].

  Runs on the host. Every process reads the whole batch and comes to the same scores.
  """
  name = run.config.eval.verifier
  verifier = get_verifier(run.data.verifier if name == "auto" else name)
  demos = run.data.prompts.demos

  def verify(step: int, rollout: Rollout) -> jax.Array:
    tokens_BxS, lengths_B, hit_eos_B = sharding.to_host(
        (rollout.tokens, rollout.lengths, rollout.hit_eos)
    )
    tokens_BxN = tokens_BxS[:, -rollout.mask.shape[1] :]
    scores = []
    # Prompts of the batch, each for as many adjacent rows as it has samples.
    items = np.repeat(batches.item_indices(step), run.config.dpr.samples_per_prompt)
    for row, i in enumerate(items):
      tokens = tokens_BxN[row, : lengths_B[row]]
      text = response_text(run.tokenizer, tokens, hit_eos_B[row], run.stop_ids)
      scores.append(verifier(demos[i], text)["accuracy"])
    return sharding.place(np.asarray(scores, np.float32), run.mesh)

  return verify


def _reinforce(run: Run, name: str, **changes) -> None:
  section = dataclasses.replace(run.config.dpr, **changes)
  if not section.steps or run.finished(name, section.steps):
    return
  scoring = scoring_of(run.config, section)
  rollout_step = make_rollout(
      run.model, run.config.model, section, run.mesh, run.stop_ids, **scoring
  )
  reinforce_step, optimizer = make_reinforce_step(run.model, run.config.model, section, run.mesh)
  batches = rollout_prompts(run.config, section, run.data.prompts.tokens)
  dpr_step = make_dpr_step(
      rollout_step,
      reinforce_step,
      sft=run.load("sft"),
      ref=run.load("ref"),
      rng=run.rng(f"{name}/rollouts"),
      beta=section.beta,
      target_kl=section.target_kl,
      beta_gain=section.beta_gain,
      kl_budget=section.kl_budget,
      verify=_make_verify(run, batches) if section.verifier_weight else None,
      verifier_weight=section.verifier_weight,
      beta_ref=section.beta_ref,
      gamma=section.gamma,
      returns=section.returns,
      baseline=section.baseline,
      group_size=section.samples_per_prompt,
      truncated=section.truncated,
      transform=transforms.parse(section.transforms),
  )
  control = initial_control(
      beta=section.beta, target_kl=section.target_kl, kl_budget=section.kl_budget
  )
  train(run, name, section, dpr_step, optimizer, batches, run.sft_float32, control=control)
  run.say(f"{name}: {dpr_step.compilations()} programs of rollout and update were compiled")


def _uncentred(run: Run) -> tuple[str, ...]:
  return tuple(t for t in run.config.dpr.transforms if t != "centre")


def dpr_stage(run: Run) -> None:
  _reinforce(run, "dpr")


def reward_to_go_stage(run: Run) -> None:
  _reinforce(run, "reward_to_go", returns="reward_to_go", transforms=_uncentred(run))


def sentence_level_stage(run: Run) -> None:
  _reinforce(run, "sentence_level", returns="full_return", transforms=_uncentred(run))


def endogenous_stage(run: Run) -> None:
  # One token's means nothing: a gauge of the logits changes it. What follows settles it.
  changes = {"reward": "endogenous", "returns": "reward_to_go", "transforms": _uncentred(run)}
  _reinforce(run, "endogenous", **changes)


def log_likelihood_stage(run: Run) -> None:
  _reinforce(run, "log_likelihood", reward="log_likelihood")
