"""The jitted programs of the main stages, from a model and its config: what trains, and is planned.

`stages/sft.py` and `stages/dpr.py` run them on weights and data; `dpr_jax.planning` compiles them
from shapes alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dpr_jax.config import DPRSection, ModelSection, RunConfig, SFTSection
from dpr_jax.data.batches import PromptBatch
from dpr_jax.data.loader import Batches, prompt_batches
from dpr_jax.losses import make_reinforce_loss, make_sft_loss
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.logprobs import chunk_size_for
from dpr_jax.rewards import transforms
from dpr_jax.rewards.references import ENSEMBLES
from dpr_jax.rollout import Sampling, make_rollout_step
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def chunk_size(how: ModelSection, cfg: ModelConfig, rows: int, mesh: jax.sharding.Mesh) -> int:
  """`model.chunk_size`, or what fills `model.logits_budget` in a batch of `rows`."""
  budget = int(how.logits_budget * 2**30)
  return how.chunk_size or chunk_size_for(rows, cfg.vocab_size, budget, mesh)


def make_sft_step(
    model: Transformer,
    how: ModelSection,
    section: SFTSection,
    mesh: jax.sharding.Mesh,
    **options: Any,
) -> tuple[Callable, optax.GradientTransformation]:
  """(train_step, optimizer) of stage `sft`; `options` are those of `make_train_step`."""
  optimizer = make_optimizer(section.optimizer, section.steps)
  rows = section.batch_size // section.accumulation
  loss_fn = make_sft_loss(model, chunk_size=chunk_size(how, model.cfg, rows, mesh))
  step = make_train_step(loss_fn, optimizer, accumulation=section.accumulation, **options)
  return step, optimizer


def scoring_of(config: RunConfig, section: DPRSection) -> dict[str, Any]:
  """Keywords of `make_rollout_step` that say what a rollout of `section` is scored for.

  How the members of an ensemble are combined, and what the reward's transforms look at beside the
  log-probs; {} where the reference is one model and no transform asks for more.

  Args:
    section: config.dpr, or that of an ablation.

  Raises:
    UserError: an unknown transform.
  """
  needed = transforms.needs(section.transforms)
  kind = config.reference.kind
  out: dict[str, Any] = {"combine": ENSEMBLES[kind]} if kind in ENSEMBLES else {}
  if "expected_rewards" in needed:
    out["expected"] = True
  if "entropies" in needed:
    out["entropies"] = True
  return out


def ema_decay(config: RunConfig) -> float:
  """Of the moving average that stage `sft` keeps; 0 where the reference needs none."""
  return config.reference.ema_decay if config.reference.kind == "ema" else 0.0


def make_rollout(
    model: Transformer,
    how: ModelSection,
    section: DPRSection,
    mesh: jax.sharding.Mesh,
    stop_ids: tuple[int, ...],
    **scoring: Any,
) -> Callable:
  """rollout_step(policy, sft, ref, prompts, rng) -> Rollout, of stage `dpr`.

  `scoring`: what is scored beside the log-probs of one reference, see `scoring_of`.
  """
  # For an expectation, the logits of policy, sft and ref live at once.
  rows = section.batch_size * (3 if scoring.get("expected") else 1)
  return make_rollout_step(
      model,
      max_new_tokens=section.max_new_tokens,
      stop_ids=stop_ids,
      sampling=Sampling(section.temperature, section.top_k, section.top_p),
      reward=section.reward,
      chunk_size=chunk_size(how, model.cfg, rows, mesh),
      samples_per_prompt=section.samples_per_prompt,
      slots=section.slots,
      refill=section.refill,
      **scoring,
  )


def make_reinforce_step(
    model: Transformer, how: ModelSection, section: DPRSection, mesh: jax.sharding.Mesh
) -> tuple[Callable, optax.GradientTransformation]:
  """(train_step, optimizer) of the update of stage `dpr`."""
  optimizer = make_optimizer(section.optimizer, section.steps)
  rows = section.batch_size // section.accumulation
  chunk = chunk_size(how, model.cfg, rows, mesh)
  loss_fn = make_reinforce_loss(model, normaliser=section.normaliser, chunk_size=chunk)
  step = make_train_step(loss_fn, optimizer, accumulation=section.accumulation)
  return step, optimizer


def rollout_prompts(
    config: RunConfig, section: DPRSection, prompts: Sequence[np.ndarray]
) -> Batches[PromptBatch]:
  """Endless batches of prompts, int32 [P_i] each, for the rollout step."""
  return prompt_batches(
      prompts,
      section.batch_size // section.samples_per_prompt,
      config.data.prompt_length,
      config.seed,
  )
