"""What all stages of one seed share, and how it is set up."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import tqdm

from dpr_jax import config as config_lib
from dpr_jax import sharding, weights
from dpr_jax.data.dataset import Dataset, build_dataset
from dpr_jax.data.loader import Batches
from dpr_jax.data.templates import stop_ids
from dpr_jax.errors import UserError
from dpr_jax.loading import compute_dtype, initial_variables, root_key, stage_variables
from dpr_jax.models import Transformer
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables, extrapolate
from dpr_jax.rewards.references import milestone_steps, reference_step
from dpr_jax.training import TrainState
from dpr_jax.training.loop import run_stage
from dpr_jax.training.optimizer import make_schedule
from dpr_jax.training.steps import abstract_state
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a run: what all its stages share."""

  config: config_lib.RunConfig
  workdir: Workdir
  mesh: jax.sharding.Mesh
  tokenizer: Any
  model: Transformer
  stop_ids: tuple[int, ...]
  data: Dataset

  @property
  def dtype(self) -> str:
    """The compute dtype, in which sft and ref are held."""
    return self.model.cfg.dtype

  def rng(self, name: str) -> jax.Array:
    return root_key(self.config.seed, name)

  def initial_variables(self, dtype: str) -> Any:
    config = self.config
    return initial_variables(config.model, self.model.cfg, self.mesh, config.seed, dtype)

  @functools.cached_property
  def frozen(self) -> Any:
    """What no stage trains, shared by policy, sft and ref: the base under LoRA, else nothing."""
    if not self.model.cfg.lora.rank:
      return {}
    return split_trainable(self.initial_variables(self.dtype))[1]

  def stage_variables(self, stage: str, step: int, dtype: str) -> Any:
    return stage_variables(
        self.workdir.stage(stage), step, self.model.cfg, self.mesh, dtype, self.frozen
    )

  def sft_float32(self) -> Any:
    """Where every later stage starts: the last SFT parameters, as they were trained."""
    return self.stage_variables("sft", self.config.sft.steps, "float32")

  def load(self, name: str) -> Any:
    """The parameter set called `name`, in the compute dtype: base, ref, sft, dpr, a baseline."""
    config = self.config
    if name == "base":
      return self.initial_variables(self.dtype)
    if name == "ref":
      step = reference_step(config.reference.fraction, config.sft.milestones, config.sft.steps)
      return self.stage_variables("sft", step, self.dtype)
    if name == "extrapolated":
      return extrapolate(self.load("sft"), self.load("ref"), contrastive_alpha(config))
    steps = config.sft.steps if name == "sft" else config.dpr.steps
    return self.stage_variables(name, steps, self.dtype)

  def bar(self, name: str, total: int, unit: str):
    """A progress bar, from process 0."""
    hidden = not self.config.log.progress or jax.process_index() != 0
    return tqdm.tqdm(
        total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, mininterval=0.5
    )


def contrastive_alpha(config: config_lib.RunConfig) -> float:
  """Strength of the training-free controls: that of DPR's optimum unless set."""
  return config.eval.contrastive_alpha or 1.0 / config.dpr.beta


def build_model(config: config_lib.RunConfig) -> tuple[Any, Transformer, tuple[int, ...], str]:
  """(tokenizer, model, stop ids, origin of the weights).

  Raises:
    UserError: unreadable weights or tokenizer, or a length beyond what the model was trained for.
  """
  section = config.model
  how = {"dtype": compute_dtype(section.dtype), "remat": section.remat, "lora": section.lora}
  generation_config = None
  if section.pretrained:
    tokenizer = weights.load_tokenizer(section.pretrained)
    generation_config = weights.load_generation_config(section.pretrained)
    cfg = dataclasses.replace(weights.load_config(section.pretrained), **how)
    origin = section.pretrained
  else:
    tokenizer = byte_tokenizer()
    cfg = dataclasses.replace(
        section.shape, vocab_size=section.shape.vocab_size or len(tokenizer), **how
    )
    if cfg.vocab_size < len(tokenizer):
      raise UserError(
          f"config.model.shape.vocab_size={cfg.vocab_size} is below the {len(tokenizer)} tokens of "
          "the tokenizer; 0 takes that number"
      )
    origin = "random"
  new = max(config.dpr.max_new_tokens, config.eval.max_new_tokens)
  for field, length in (
      ("data.row_length", config.data.row_length),
      ("data.prompt_length + max_new_tokens", config.data.prompt_length + new),
  ):
    if length > cfg.max_length:
      raise UserError(
          f"config.{field}={length} exceeds the {cfg.max_length} tokens that the model was made for"
      )
  ends = stop_ids(tokenizer, generation_config, config.data.template)
  return tokenizer, Transformer(cfg), ends, origin


def set_up(config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh) -> Run:
  """Everything that can be wrong with the input shows here, before anything is written."""
  workdir.check(config)
  sharding.check_batch(
      mesh,
      sft__batch_size=config.sft.batch_size // config.sft.accumulation,
      dpr__batch_size=config.dpr.batch_size // config.dpr.accumulation,
      eval__batch_size=config.eval.batch_size,
  )
  milestone_steps(config.sft.milestones, config.sft.steps)
  reference_step(config.reference.fraction, config.sft.milestones, config.sft.steps)
  tokenizer, model, ends, origin = build_model(config)
  data = build_dataset(config.data, tokenizer, config.seed)
  workdir.claim(
      config,
      model={
          "source": origin,
          "num_params": model.cfg.num_params,
          "config": model.cfg.to_dict(),
          "stop_ids": list(ends),
      },
      data=data.summary,
      devices={"platform": jax.default_backend(), "count": jax.device_count()},
  )
  if jax.process_index() == 0:
    tokenizer.save_pretrained(workdir.tokenizer)
  return Run(config, workdir, mesh, tokenizer, model, ends, data)


def train(
    run: Run,
    name: str,
    section: Any,
    step_fn: Callable,
    optimizer: Any,
    batches: Batches,
    variables: Callable[[], Any],
    keep_steps: tuple[int, ...] = (),
) -> None:
  """Runs one stage to its end. `section` is config.sft or config.dpr; baselines use the latter."""
  config, rng = run.config, run.rng(name)
  abstract, _ = split_trainable(abstract_variables(run.model.cfg, run.mesh))

  def make_state():
    trainable, _ = split_trainable(variables())
    return TrainState.create(trainable, optimizer, rng, run.frozen)

  run_stage(
      name,
      step_fn,
      make_state=make_state,
      abstract=abstract_state(abstract, optimizer, rng),
      frozen=run.frozen,
      batches=batches,
      steps=section.steps,
      directory=run.workdir.stage(name),
      mesh=run.mesh,
      checkpoint_every=config.checkpoint.every,
      checkpoint_keep=config.checkpoint.keep,
      keep_steps=keep_steps,
      log_every=config.log.every,
      progress=config.log.progress,
      tensorboard_dir=run.workdir.tensorboard / name if config.log.tensorboard else None,
      schedule=make_schedule(section.optimizer, section.steps),
  )


def process_block() -> dict[str, int]:
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}
