"""What all stages of one seed share, and how it is set up."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm

from dpr_jax import config as config_lib
from dpr_jax import sharding, weights
from dpr_jax.data.dataset import Dataset, build_dataset
from dpr_jax.data.loader import Batches
from dpr_jax.data.templates import stop_ids
from dpr_jax.errors import UserError
from dpr_jax.loading import (
    base_variables,
    compute_dtype,
    describe_checkpoint,
    fresh_adapter,
    root_key,
    stage_variables,
)
from dpr_jax.models import Transformer
from dpr_jax.models.attention import resolve_backend
from dpr_jax.models.layer_pruning import pruned_config
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables, cast, extrapolate, mean
from dpr_jax.rewards.references import (
    ENSEMBLES,
    Member,
    candidate_fractions,
    milestone_steps,
    reference_members,
)
from dpr_jax.stages.steps import chunk_size
from dpr_jax.training import TrainState
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.loop import run_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.optimizer import make_schedule
from dpr_jax.training.profiling import parse_steps
from dpr_jax.training.steps import abstract_state
from dpr_jax.training.stopping import last_step
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
    """What the SFT stage starts from; what is trained has `dtype`."""
    config, cfg = self.config, self.model.cfg
    if cfg.lora.rank:
      return {**self.frozen, **fresh_adapter(cfg, self.mesh, config.seed, dtype)}
    return base_variables(config.model, cfg, self.mesh, config.seed, dtype)

  @functools.cached_property
  def frozen(self) -> Any:
    """What no stage trains, shared by policy, sft and ref: the base under LoRA, else nothing."""
    if not self.model.cfg.lora.rank:
      return {}
    config = self.config
    return base_variables(config.model, self.model.cfg, self.mesh, config.seed, self.dtype)

  def stage_variables(self, stage: str, step: int, dtype: str, part: str = "variables") -> Any:
    return stage_variables(
        self.workdir.stage(stage), step, self.model.cfg, self.mesh, dtype, self.frozen, part
    )

  def sft_float32(self) -> Any:
    """Where every later stage starts: the last SFT parameters, as they were trained."""
    return self.stage_variables("sft", self.config.sft.steps, "float32")

  @property
  def ensemble(self) -> str:
    """How the members of a reference are combined; "" for a reference of one."""
    return ENSEMBLES.get(self.config.reference.kind, "")

  @functools.cached_property
  def ref_members(self) -> tuple[Member, ...]:
    """The checkpoints that are pi_ref, after a selection if there is one."""
    if self.config.reference.select == "none":
      return reference_members(self.config)
    record = json.loads(self.workdir.reference_file.read_text(encoding="utf-8"))
    return reference_members(self.config, record["fraction"])

  @property
  def ref_names(self) -> tuple[str, ...]:
    """What `load` calls the members of the reference."""
    if not self.ensemble:
      return ("ref",)
    return tuple(f"ref/{i}" for i in range(len(self.ref_members)))

  def member_variables(self, members: tuple[Member, ...], dtype: str) -> Any:
    """Variables of a reference, a tuple of them for an ensemble (see `rewards.references`)."""
    found = tuple(self.stage_variables(m.stage, m.step, dtype, m.part) for m in members)
    return found if self.ensemble else found[0]

  def ref_variables(self, dtype: str) -> Any:
    return self.member_variables(self.ref_members, dtype)

  def last_step(self, stage: str, steps: int) -> int:
    """The step of a stage's result: `steps`, unless it ended before."""
    return last_step(self.workdir.stage(stage), steps)

  def finished(self, stage: str, steps: int) -> bool:
    """Whether a stage has its last checkpoint, so that nothing needs to be loaded for it."""
    folder = self.workdir.stage(stage) / "checkpoints"
    if not folder.is_dir():
      return False
    with Checkpoints(folder, read_only=True) as checkpoints:
      return self.last_step(stage, steps) in checkpoints.steps()

  @property
  def contrastive_alpha(self) -> float:
    """Strength of the controls without training: that of the plain reward's optimum unless set.

    (1 - beta_ref) / (beta + beta_ref), negative where beta_ref > 1 pulls from sft back to ref. With
    config.dpr.target_kl, beta is that of the last step that DPR made.
    """
    config = self.config
    beta = config.dpr.beta
    if config.dpr.target_kl:
      lines = read_metrics(self.workdir.stage("dpr") / "metrics.jsonl")
      beta = lines[-1]["beta"] if lines else beta
    beta_ref = config.dpr.beta_ref
    return config.eval.contrastive_alpha or (1.0 - beta_ref) / (beta + beta_ref)

  def load(self, name: str) -> Any:
    """The parameter set called `name`, in the compute dtype: base, ref, sft, dpr, a baseline.

    An ensemble "ref" is a tuple; its members are ref/0, ref/1, ...
    """
    config = self.config
    if name == "base":
      return self.initial_variables(self.dtype)
    if name == "ref":
      return self.ref_variables(self.dtype)
    if name.startswith("ref/"):
      m = self.ref_members[int(name.removeprefix("ref/"))]
      return self.stage_variables(m.stage, m.step, self.dtype, m.part)
    if name == "extrapolated":
      # In float32: the difference of two nearby checkpoints is about as small as bfloat16's steps.
      sft, ref = self.sft_float32(), self.ref_variables("float32")
      ref = mean(ref) if self.ensemble else ref
      return cast(extrapolate(sft, ref, self.contrastive_alpha), self.dtype)
    steps = self.last_step(name, config.sft.steps if name == "sft" else config.dpr.steps)
    return self.stage_variables(name, steps, self.dtype)

  def chunk_size(self, rows: int) -> int:
    """Token columns whose logits live at a time in a batch of `rows`."""
    return chunk_size(self.config.model, self.model.cfg, rows, self.mesh)

  def say(self, text: str) -> None:
    """A line beside the progress bars, from process 0."""
    if self.config.log.progress and jax.process_index() == 0:
      print(text, file=sys.stderr)

  def bar(self, name: str, total: int, unit: str):
    """A progress bar, from process 0."""
    hidden = not self.config.log.progress or jax.process_index() != 0
    return tqdm.tqdm(
        total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, mininterval=0.5
    )


def build_model(
    config: config_lib.RunConfig,
) -> tuple[Any, Transformer, tuple[int, ...], dict[str, Any]]:
  """(tokenizer, model, stop ids, generation config of the weights).

  Raises:
    UserError: unreadable weights or tokenizer, or a length beyond what the model was trained for.
  """
  section = config.model
  how = {name: getattr(section, name) for name in ("remat", "attention", "lora")}
  how["dtype"] = compute_dtype(section.dtype)
  generation_config = {}
  if section.pretrained:
    tokenizer = weights.load_tokenizer(section.pretrained)
    generation_config = weights.load_generation_config(section.pretrained)
    cfg = pruned_config(weights.load_config(section.pretrained), section.keep_layers)
    cfg = dataclasses.replace(cfg, **how)
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
  resolve_backend(cfg, config.data.row_length)  # Refuses here what the first step would refuse.
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
  return tokenizer, Transformer(cfg), ends, generation_config


def check_expert(config: config_lib.RunConfig, model: Transformer, tokenizer: Any) -> None:
  """Refuses an expert that cannot be compared with the run's model; reads no weights of it.

  Raises:
    UserError: no such checkpoint, another vocabulary, or one made for shorter sequences.
  """
  spec = config.eval.expert
  try:
    cfg, theirs = describe_checkpoint(spec)
  except UserError as e:
    raise UserError(f"config.eval.expert: {e}") from None
  own, other = tokenizer.get_vocab(), theirs.get_vocab()
  if own != other:
    token = min(t for t in {*own, *other} if own.get(t) != other.get(t))
    raise UserError(
        f"config.eval.expert={spec} has another vocabulary than the run (token {token!r} has the "
        f"id {other.get(token)} there, {own.get(token)} here); name the model that the "
        "demonstrations were sampled from, with the run's tokenizer"
    )
  if cfg.vocab_size != model.cfg.vocab_size:
    raise UserError(
        f"config.eval.expert={spec} has {cfg.vocab_size} logits, the run's model "
        f"{model.cfg.vocab_size}; distributions over the vocabulary need the same number"
    )
  length = config.data.prompt_length + config.eval.max_new_tokens
  if length > cfg.max_length:
    raise UserError(
        f"config.data.prompt_length + config.eval.max_new_tokens={length} exceeds the "
        f"{cfg.max_length} tokens that config.eval.expert={spec} was made for"
    )


def absolute(path: str) -> str:
  """The path from the root, so that it is found from any directory; "" stays ""."""
  return os.path.abspath(path) if path else ""


def set_up(
    config: config_lib.RunConfig,
    workdir: Workdir,
    mesh: jax.sharding.Mesh,
    like: Run | None = None,
) -> Run:
  """Everything that can be wrong with the input shows here, before anything is written.

  Args:
    like: a run set up before, whose data are taken if they are the same.
  """
  workdir.check(config)
  sharding.check_batch(
      mesh,
      sft__batch_size=config.sft.batch_size // config.sft.accumulation,
      dpr__batch_size=config.dpr.batch_size // config.dpr.accumulation,
      eval__batch_size=config.eval.batch_size,
  )
  dpr = config.dpr
  sharding.check_rollouts(mesh, dpr.batch_size, dpr.samples_per_prompt, dpr.slots)
  if {"spin", "gsil"} & set(config.baseline.names):  # Half as many pairs as DPR has rollouts.
    half = config.dpr.batch_size // config.dpr.accumulation // 2
    sharding.check_batch(mesh, dpr__batch_size=half)
  milestone_steps(config.sft.milestones, config.sft.steps)
  reference_members(config)
  if config.reference.select != "none":
    candidate_fractions(config)
  tokenizer, model, ends, generation_config = build_model(config)
  if config.eval.expert:
    check_expert(config, model, tokenizer)
  same = lambda c: (c.data, c.model, c.seed)
  if like is not None and same(config) == same(like.config):
    data = like.data
  else:
    data = build_dataset(config.data, tokenizer, config.seed)
  skip, found = config.eval.skip_prompts, len(data.heldout.tokens)
  if skip >= found:
    raise UserError(
        f"config.eval.skip_prompts={skip} leaves nothing to evaluate on: of config.data.holdout="
        f"{config.data.holdout} there are {found} prompts within config.data.prompt_length"
    )
  workdir.claim(
      config,
      model={
          "source": config.model.pretrained or "random",
          "pretrained": absolute(config.model.pretrained),
          "generation_config": generation_config,
          "num_params": model.cfg.num_params,
          "config": model.cfg.to_dict(),
          "stop_ids": list(ends),
      },
      data={**data.summary, "template": absolute(config.data.template)},
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
    ema: bool = False,
    control: Mapping[str, float] | None = None,
) -> None:
  """Runs one stage to its end. `section` is config.sft or config.dpr; baselines use the latter.

  Args:
    ema, control: what the state carries beside its optimizer (see `training.TrainState`).
  """
  config, rng = run.config, run.rng(name)
  abstract, _ = split_trainable(abstract_variables(run.model.cfg, run.mesh))

  def make_state():
    trainable, _ = split_trainable(variables())
    return TrainState.create(trainable, optimizer, rng, run.frozen, ema=ema, control=control)

  run_stage(
      name,
      step_fn,
      make_state=make_state,
      abstract=abstract_state(abstract, optimizer, rng, ema=ema, control=control),
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
      profile_steps=parse_steps(config.log.profile_steps, "config.log.profile_steps"),
      profile_dir=run.workdir.profile / name,
  )
