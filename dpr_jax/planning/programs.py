"""The three programs of a run, lowered from shapes alone: the very functions that train.

    sft_step        forward, backward, AdamW
    rollout_step    sampling, and fused scoring under sft and ref
    reinforce_step  the update on those rollouts

No weights, no data and no tokenizer are needed: the model's shape comes from config.model.shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax import sharding
from dpr_jax.config import RunConfig
from dpr_jax.data.batches import SFTBatch
from dpr_jax.errors import UserError
from dpr_jax.losses import reinforce_batch
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.layer_pruning import pruned_config
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables
from dpr_jax.rewards.references import ENSEMBLES, reference_members
from dpr_jax.stages.steps import (
    ema_decay,
    make_reinforce_step,
    make_rollout,
    make_sft_step,
    rollout_prompts,
    scoring_of,
)
from dpr_jax.training.steps import TrainState, abstract_state

NAMES = ("sft_step", "rollout_step", "reinforce_step")


@dataclasses.dataclass(frozen=True)
class Program:
  """What can be compiled, and what else lies in memory while it runs."""

  lower: Callable[[], Any]  # () -> jax.stages.Lowered; call it under the mesh.
  resident_bytes: float  # a device: what is alive but no argument, the moments or sft and ref.


def planned_model(config: RunConfig) -> ModelConfig:
  """The shape of the config's model, computed as on an accelerator.

  Raises:
    UserError: the config has no shape, or asks for longer rows than the model takes.
  """
  section = config.model
  if not section.shape.vocab_size:
    raise UserError("config.model.shape.vocab_size=0 is that of the byte-level tokenizer; a plan "
                    "needs the number, for example --config.model.shape.vocab_size=272")
  how = {"dtype": "bfloat16" if section.dtype == "auto" else section.dtype,
         "remat": section.remat, "attention": section.attention, "lora": section.lora}
  cfg = dataclasses.replace(pruned_config(section.shape, section.keep_layers), **how)
  for field, length in (("data.row_length", config.data.row_length),
                        ("data.prompt_length + dpr.max_new_tokens",
                         config.data.prompt_length + config.dpr.max_new_tokens)):
    if length > cfg.max_length:
      raise UserError(f"config.{field}={length} exceeds config.model.shape.max_length="
                      f"{cfg.max_length}")
  return cfg


def device_bytes(tree: Any) -> float:
  """Bytes of a tree of ShapeDtypeStructs that one device holds."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    total += int(np.prod(shape)) * (8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                                    else x.dtype.itemsize)
  return total


def _rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Arrays as ShapeDtypeStructs, rows over data and fsdp: where `sharding.place` puts a batch."""
  how = sharding.batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree)


def check_rows(config: RunConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
  """Raises UserError naming the batch whose micro-batches the mesh does not divide."""
  sharding.check_batch(
      mesh,
      sft__batch_size=config.sft.batch_size // config.sft.accumulation,
      dpr__batch_size=config.dpr.batch_size // config.dpr.accumulation,
  )
  dpr = config.dpr
  sharding.check_rollouts(mesh, dpr.batch_size, dpr.samples_per_prompt, dpr.slots)


def scored_models(config: RunConfig) -> int:
  """How many models score a rollout: sft, the members of ref, for some transforms the policy."""
  expected = "expected" in scoring_of(config, config.dpr)
  return 1 + len(reference_members(config)) + expected


def make_programs(
    config: RunConfig, cfg: ModelConfig, mesh: jax.sharding.Mesh
) -> dict[str, Program]:
  """The programs of `config` on `mesh`, whose devices may exist only for the compiler.

  Call it while no such mesh is set: it makes a key, which would be computed there.

  Raises:
    UserError: a batch that the mesh does not divide, a reference without its milestone, or an
      unknown transform; names the field.
  """
  check_rows(config, mesh)
  model, key = Transformer(cfg), jax.random.key(config.seed)
  trainable, _ = split_trainable(abstract_variables(cfg, mesh))
  held = abstract_variables(cfg, mesh, cfg.dtype)  # of sft and ref.
  adapted, frozen = split_trainable(held)

  members = len(reference_members(config))
  ref = (held,) * members if config.reference.kind in ENSEMBLES else held

  def state(optimizer, ema: bool = False) -> TrainState:
    return abstract_state(trainable, optimizer, key, ema=ema).replace(frozen=frozen)

  decay = ema_decay(config)
  sft_step, sft_optimizer = make_sft_step(
      model, config.model, config.sft, mesh, ema_decay=decay
  )
  shape = jax.ShapeDtypeStruct((config.sft.batch_size, config.data.row_length), jnp.int32)
  rows = SFTBatch(
      tokens=shape, segment_ids=shape, loss_mask=jax.ShapeDtypeStruct(shape.shape, jnp.float32)
  )
  sft_state = state(sft_optimizer, ema=decay > 0)

  section = config.dpr
  # Any stop id does: it is a constant of the program.
  scoring = scoring_of(config, section)
  rollout_step = make_rollout(model, config.model, section, mesh, stop_ids=(0,), **scoring)
  reinforce_step, optimizer = make_reinforce_step(model, config.model, section, mesh)
  dpr_state = state(optimizer)
  one = np.zeros((config.data.prompt_length,), np.int32)  # The widest that a run compiles for.
  prompts = _rows(next(iter(rollout_prompts(config, section, [one]))), mesh)
  rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
  arguments = (dpr_state.variables, held, ref, prompts, rng)

  def rollouts():
    weigh = lambda r: reinforce_batch(r, beta=1.0)[0]
    return _rows(jax.eval_shape(weigh, jax.eval_shape(rollout_step, *arguments)), mesh)

  # Under LoRA policy, sft and ref share one base, which is an argument of every program.
  others = 1 + members
  return {
      "sft_step": Program(lambda: sft_step.lower(sft_state, _rows(rows, mesh)), 0),
      "rollout_step": Program(
          lambda: rollout_step.lower(*arguments),
          device_bytes(dpr_state.opt_state) - others * device_bytes(frozen),
      ),
      "reinforce_step": Program(
          lambda: reinforce_step.lower(dpr_state, rollouts()), others * device_bytes(adapted)
      ),
  }
