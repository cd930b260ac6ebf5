"""The jitted programs of the main stages, from a model and its config: what trains, and is planned.

`stages/sft.py` and `stages/dpr.py` run them on weights and data; `dpr_jax.planning` compiles them
from shapes alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax

from dpr_jax.config import DPRSection, ModelSection, RunConfig, SFTSection
from dpr_jax.data.batches import PromptBatch
from dpr_jax.data.loader import Batches, prompt_batches
from dpr_jax.losses import make_reinforce_loss, make_sft_loss
from dpr_jax.models import Transformer
from dpr_jax.rollout import Sampling, make_rollout_step
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer


def make_sft_step(
    model: Transformer, how: ModelSection, section: SFTSection, **options: Any
) -> tuple[Callable, optax.GradientTransformation]:
  """(train_step, optimizer) of stage `sft`; `options` are those of `make_train_step`."""
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_sft_loss(model, chunk_size=how.chunk_size)
  step = make_train_step(loss_fn, optimizer, accumulation=section.accumulation, **options)
  return step, optimizer


def make_rollout(
    model: Transformer, how: ModelSection, section: DPRSection, stop_ids: tuple[int, ...]
) -> Callable:
  """rollout_step(policy, sft, ref, prompts, rng) -> Rollout, of stage `dpr`."""
  return make_rollout_step(
      model,
      max_new_tokens=section.max_new_tokens,
      stop_ids=stop_ids,
      sampling=Sampling(section.temperature, section.top_k, section.top_p),
      reward=section.reward,
      chunk_size=how.chunk_size,
  )


def make_reinforce_step(
    model: Transformer, how: ModelSection, section: DPRSection
) -> tuple[Callable, optax.GradientTransformation]:
  """(train_step, optimizer) of the update of stage `dpr`."""
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_reinforce_loss(model, normaliser=section.normaliser, chunk_size=how.chunk_size)
  step = make_train_step(loss_fn, optimizer, accumulation=section.accumulation)
  return step, optimizer


def rollout_prompts(
    config: RunConfig, section: DPRSection, prompts: Sequence[np.ndarray]
) -> Batches[PromptBatch]:
  """Endless batches of prompts, int32 [P_i] each, for the rollout step."""
  return prompt_batches(
      prompts,
      section.batch_size,
      config.data.prompt_length,
      config.seed,
      samples_per_prompt=section.samples_per_prompt,
  )
