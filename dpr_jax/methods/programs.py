"""What a method compiles, described for planning: from shapes alone, without weights or data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax import sharding
from dpr_jax.data.batches import rows_apart
from dpr_jax.keys import make_key
from dpr_jax.models import Transformer
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables
from dpr_jax.references.base import Reference


@dataclasses.dataclass(frozen=True)
class TrainWork:
  """Forward and backward passes over rows, and an update."""

  rows: int  # per step.
  tokens: int  # per row.
  logits: int  # columns whose logits are computed, per row.
  accumulation: int = 1
  ema: bool = False
  held: int = 0  # models beside the one that is trained, in the compute dtype.
  teachers: int = 0  # of them, those whose logits live with the trained one's, made of kept states.


@dataclasses.dataclass(frozen=True)
class RolloutWork:
  """Sampling, and teacher-forced scoring of what was sampled."""

  rows: int  # responses per step.
  prompt: int  # columns.
  new: int  # response columns.
  scored: int  # forward passes that score a response.
  samples: int = 1  # responses that share a prompt and its prefill.
  slots: int = 0  # responses decoded at a time; 0: all at once.
  held: int = 0  # models beside the one that is trained, in the compute dtype.
  logits_models: int = 1  # models whose logits of a chunk of columns live at a time.
  kept_states: int = 0  # models whose hidden states of the response columns are a result.

  @property
  def decoded(self) -> int:
    """Responses decoded at a time."""
    return min(self.slots or self.rows, self.rows)

  @property
  def steps(self) -> int:
    """Passes of the decoding batch where no response ends before its `new` tokens."""
    # The last token is sampled and never fed.
    return -(-self.rows // self.decoded) * (self.new - 1)


@dataclasses.dataclass(frozen=True)
class Program:
  """What can be compiled, how much work it is, and what else lies in memory while it runs."""

  name: str  # STAGE/PROGRAM, as in "dpr/rollout_step".
  lower: Callable[[], jax.stages.Lowered]  # call it under the mesh.
  work: TrainWork | RolloutWork
  resident_bytes: float = 0.0  # per device: what is alive but no argument.
  tokens: int = 0  # trained or sampled per step; 0 in all programs of a step but the last.

  @property
  def stage(self) -> str:
    return self.name.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Abstract arrays of a run on a mesh whose devices may exist only for the compiler.

  Make it while no such mesh is set: its key would be computed there.
  """

  config: Any  # a RunConfig.
  model: Transformer
  mesh: jax.sharding.Mesh
  stop_ids: tuple[int, ...] = (0,)  # Any stop id does: it is a constant of the program.

  def __post_init__(self):
    _ = self.key  # Made now: under a mesh of devices that do not exist it could not be.

  @functools.cached_property
  def key(self) -> jax.Array:
    return make_key(self.config.seed)

  @functools.cached_property
  def abstract_key(self) -> jax.ShapeDtypeStruct:
    where = sharding.replicated(self.mesh)
    return jax.ShapeDtypeStruct(self.key.shape, self.key.dtype, sharding=where)

  @functools.cached_property
  def trainable(self) -> Any:
    """What is trained, float32."""
    return split_trainable(abstract_variables(self.model.cfg, self.mesh))[0]

  @functools.cached_property
  def held(self) -> Any:
    """The variables of one model in the compute dtype."""
    return abstract_variables(self.model.cfg, self.mesh, self.model.cfg.dtype)

  @property
  def reference(self) -> Reference:
    return Reference((self.held,) * self.config.reference.num_members)

  def state(self, step: Any) -> Any:
    """The abstract state that a step takes; make it before `Program.lower`: optax computes here."""
    frozen = split_trainable(self.held)[1]
    return step.abstract(self.trainable, self.key).replace(frozen=frozen, control={})

  def rows(self, tree: Any) -> Any:
    """Arrays as ShapeDtypeStructs, rows over data and fsdp: where `sharding.place` puts a batch.

    What is `Shared` stays where it is, and on every device if that is not said.
    """
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    rows, join = rows_apart(tree)
    tree = join([place(x, sharding.batch_sharding(self.mesh)) for x in rows])
    return jax.tree.map(lambda x: place(x, x.sharding or sharding.replicated(self.mesh)), tree)

  def held_bytes(self, models: int) -> tuple[float, float]:
    """(what so many models take per device beside a shared base, that base once per model)."""
    adapted, frozen = split_trainable(self.held)
    return models * device_bytes(adapted), models * device_bytes(frozen)


def device_bytes(tree: Any) -> float:
  """Bytes of a tree of ShapeDtypeStructs that one device holds."""
  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    total += int(np.prod(shape)) * (8 if is_key else x.dtype.itemsize)
  return total
