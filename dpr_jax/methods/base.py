"""What a method is: a way to answer that a run compares with the others, by its name.

A method that trains starts at the last SFT checkpoint and has a budget: that of `config.budget`,
which all share so that comparisons are fair, or its own where its fields say so. (`cleaned_sft`
starts before SFT, and has the budget of SFT.)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dpr_jax import sharding
from dpr_jax.config.fields import Value, overlay, setting
from dpr_jax.config.sections import Budget, OptimizerChanges, SFTSection
from dpr_jax.data.batches import SFTBatch
from dpr_jax.errors import UserError
from dpr_jax.evaluation.systems import System
from dpr_jax.methods.programs import Program, Shapes
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables
from dpr_jax.paths import is_link
from dpr_jax.training import make_train_step
from dpr_jax.training.loop import Stage, Training, run_side_by_side, run_stage
from dpr_jax.training.optimizer import make_optimizer
from dpr_jax.training.steps import LossFn, TrainStep
from dpr_jax.training.stopping import FILE as STOPPED_FILE

_BUDGET = ("steps", "batch_size", "accumulation", "max_new_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Value):
  """A way to answer; one that needs no training derives from this class directly."""

  label: str = setting("", "label in tables and plots; '' is made of its kind")

  trained: ClassVar[bool] = False
  subject: ClassVar[bool] = False  # learns from the reward: compared with every other system.
  reads_reference: ClassVar[bool] = False
  reads_benchmark: ClassVar[bool] = False  # trains on what it says of responses.

  def refers(self) -> tuple[str, ...]:
    """Names of other methods of the config whose settings this one reads."""
    return ()

  def stages(self, name: str) -> tuple[str, ...]:
    """Folders of the workdir in which it trains; the first has its result."""
    return (name,)

  def reference_step(self, config: Any) -> int:
    """The step of an early checkpoint that its stage keeps, to be a ref for others; 0: none."""
    return 0

  def optimum_strength(
      self, config: Any, name: str, lines: Sequence[Mapping[str, Any]] = ()
  ) -> float | None:
    """The alpha with which sft + alpha (sft - ref) is its optimum; None if it has none.

    Args:
      lines: the metrics that its stage has written.
    """
    return None

  def system(self, run: Any, name: str) -> System:
    """How it answers, after training."""
    raise NotImplementedError

  def check_mesh(self, mesh: Any, config: Any) -> None:
    """Raises ValueError where its batches do not split over a mesh."""

  def programs(self, shapes: Shapes, name: str) -> list[Program]:
    """What it compiles to train, for planning."""
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedMethod(Method):
  """A method that trains; its fields override those of `config.budget`."""

  steps: int | None = setting(None, "optimizer updates; None: config.budget.steps", low=1)
  batch_size: int | None = setting(None, "rows per step; None: config.budget.batch_size", low=1)
  accumulation: int | None = setting(
      None, "micro-batches per step; None: config.budget.accumulation", low=1
  )
  max_new_tokens: int | None = setting(
      None, "longest response in tokens; None: config.budget.max_new_tokens", low=1
  )
  optimizer: OptimizerChanges = setting(
      OptimizerChanges(), "fields that differ from config.budget.optimizer"
  )

  trained = True

  def __post_init__(self):
    if isinstance(self.optimizer, Mapping):
      known = [f.name for f in dataclasses.fields(OptimizerChanges)]
      for name in self.optimizer:
        if name not in known:
          raise ValueError(f"optimizer.{name} is not a field; known: {', '.join(sorted(known))}")
      object.__setattr__(self, "optimizer", OptimizerChanges(**self.optimizer))

  def budget(self, config: Any) -> Budget:
    """Its own budget under a `RunConfig`.

    Raises:
      ValueError: micro-batches of different sizes.
    """
    shared = config.budget
    own = {name: getattr(self, name) for name in _BUDGET}
    return overlay(shared, {**own, "optimizer": overlay(shared.optimizer, self.optimizer)})

  def own_budget(self) -> str:
    """What differs from the shared budget, as in "steps 50, learning_rate 1e-05"; "" if nothing."""
    own = {name: getattr(self, name) for name in _BUDGET} | vars(self.optimizer)
    return ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)

  def check(self, config):
    self.budget(config)

  def check_mesh(self, mesh, config):
    budget = self.budget(config)
    sharding.check_rows(mesh, "batch_size / accumulation", budget.batch_size // budget.accumulation)

  def build(self, run: Any, name: str) -> Training:
    """What the stage `name` trains."""
    raise NotImplementedError

  def programs(self, shapes, name):
    raise UserError(f"config.methods.{name}: {type(self).__name__} declares no programs, so that "
                    "it cannot be planned; define `programs`, or leave it out with --methods")

  def train(self, run: Any, name: str) -> None:
    """Runs the stage to its end, from wherever it stopped."""
    train_stage(run, name, self.budget(run.config).steps, lambda: self.build(run, name))

  def system(self, run, name):
    return System(name, load=lambda: (run.result(name),))


def train_stage(
    run: Any, name: str, steps: int, build: Callable[[], Training], keep_steps: tuple[int, ...] = ()
) -> None:
  """Runs a stage in the workdir of a run."""
  train_planned(plan_stage(run, name, steps, build, keep_steps))


def train_planned(planned: "PlannedStage") -> None:
  """Runs a stage; nothing of another one stays in memory."""
  planned.run.release()
  if run_stage(planned.stage, planned.begin) is not None:
    planned.record()


def train_side_by_side(stages: Sequence["PlannedStage"]) -> None:
  """Runs stages of one workdir whose runs have meshes without a common device."""
  for stage in stages:
    stage.run.release()
  # One trace at a time: that of the first shows all devices.
  unprofiled = lambda stage: dataclasses.replace(
      stage, log=dataclasses.replace(stage.log, profile_steps=""))
  pairs = [(unprofiled(planned.stage) if i else planned.stage, planned.begin)
           for i, planned in enumerate(stages)]
  for planned, state in zip(stages, run_side_by_side(pairs), strict=True):
    if state is not None:
      planned.record()


@dataclasses.dataclass(frozen=True)
class PlannedStage:
  """A stage of a run, and the record of what it writes."""

  run: Any
  stage: Stage
  build: Callable[[], Training]

  @property
  def _files(self) -> tuple[Any, ...]:
    folder = self.stage.directory
    return () if is_link(folder) else (folder / "metrics.jsonl", folder / STOPPED_FILE)

  def begin(self) -> Training:
    self.run.workdir.record(*self._files, finished=False)
    return self.build()

  def record(self) -> None:
    """Not of a stage that was finished before: its files may not be what was written."""
    self.run.workdir.record(*self._files)


def plan_stage(
    run: Any, name: str, steps: int, build: Callable[[], Training], keep_steps: tuple[int, ...] = ()
) -> PlannedStage:
  """What `train_stage` runs."""
  stage = Stage(
      name=name,
      directory=run.workdir.stage(name),
      mesh=run.mesh,
      steps=steps,
      keep_steps=keep_steps,
      checkpoint=run.config.checkpoint,
      log=run.config.log,
      tensorboard_dir=run.workdir.tensorboard / name,
      profile_dir=run.workdir.profile / name,
  )
  return PlannedStage(run, stage, build)


def make_step(loss: LossFn, budget: Budget | SFTSection, ema_decay: float = 0.0) -> TrainStep:
  """The train step of a loss; its optimizer runs over the steps of the budget."""
  optimizer = make_optimizer(budget.optimizer, budget.steps)
  return make_train_step(
      loss, optimizer, accumulation=budget.accumulation, ema_decay=ema_decay
  )


def make_training(
    run: Any, name: str, step: Any, optimizer: Any, batches: Any, start: Callable[[], Any]
) -> Training:
  """A `Training` of a run's model.

  Args:
    start: makes the variables at step 0, float32 where they are trained.
  """
  return Training(
      step=step,
      batches=batches,
      start=lambda: split_trainable(start())[0],
      abstract=split_trainable(abstract_variables(run.model.cfg, run.mesh))[0],
      rng=run.rng(name),
      frozen=run.frozen,
      schedule=optimizer.schedule,
  )


def row_batch(shapes: Shapes, rows: int, tokens: int) -> Any:
  """An abstract `SFTBatch`."""
  shape = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  mask = jax.ShapeDtypeStruct(shape.shape, jnp.float32)
  return shapes.rows(SFTBatch(tokens=shape, segment_ids=shape, loss_mask=mask))
