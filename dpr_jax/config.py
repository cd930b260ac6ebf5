"""Every field of a run, with its unit and meaning, and its validation.

The dataclasses below are the one description. `default_config()` turns them into a
locked `ml_collections.ConfigDict`, which the files in configs/ override and the command
line overrides further (`--config.sft.steps=200`); `resolve()` turns that back into a
validated, frozen `RunConfig` at the door.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from dpr_jax.errors import UserError
from dpr_jax.models.config import ATTENTION, ModelConfig
from dpr_jax.models.lora import LoRA
from dpr_jax.rewards import transforms
from dpr_jax.rewards.references import ENSEMBLES


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """What is trained, and how it is computed."""

  pretrained: str = ""  # HF folder or .gguf; "" starts from random weights of the shape below.
  # Of the pretrained weights, so many layers, evenly spaced from the first to the last: a smaller
  # student that starts from the large model. 0 keeps all.
  keep_layers: int = 0
  dtype: str = "auto"  # of activations and matmuls; auto: bfloat16 on TPU and GPU, float32 on CPU.
  remat: str = "full"  # none | dots | full: what the backward pass recomputes.
  # auto | xla | cudnn | splash: what computes attention over whole rows; auto: cuDNN on GPU and
  # splash on TPU where they take the dtype and shape, else XLA.
  attention: str = "auto"
  chunk_size: int = 0  # token columns whose logits live at a time; 0 fills logits_budget.
  logits_budget: float = 0.25  # GiB a device for the logits of a loss or of scoring.
  lora: LoRA = LoRA()  # adapters to train instead of all parameters; see models/lora.py.
  # Of a model that starts from random weights; ignored with `pretrained`. A vocab_size of 0 takes
  # that of the byte-level tokenizer; `dtype`, `remat`, `attention` and `lora` stand above.
  shape: ModelConfig = ModelConfig(vocab_size=0)


@dataclasses.dataclass(frozen=True)
class DataSection:
  """Demonstrations: the built-in tasks, or a file."""

  demos: str = ""  # JSONL, JSON or Parquet; "" makes demonstrations of the built-in tasks.
  format: str = "auto"  # auto | messages | prompt_response | alpaca | sharegpt | gsm8k.
  on_empty: str = "error"  # error | drop: a demonstration with an empty response.
  max_demos: int = 0  # use the first so many of the file; 0 uses all.
  holdout: int = 256  # demonstrations kept for evaluation, disjoint in prompts.
  template: str = ""  # a .jinja chat template; "" uses the tokenizer's own.
  train_on: str = "all"  # all | last: assistant turns that are trained.
  row_length: int = 64  # tokens a packed row.
  overlong: str = "drop"  # drop | truncate | error: a demonstration longer than a row.
  prompt_length: int = 48  # tokens; the budget of a prompt to be continued.
  overlong_prompt: str = "error"  # error | drop: a prompt beyond that budget.
  # Built-in tasks.
  tasks: tuple[str, ...] = ()  # names of data/tasks.py; () takes all.
  num_demos: int = 20_000  # training demonstrations.
  corrupt: float = 0.0  # share of training demonstrations with a wrong answer.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW. The step count is the stage's."""

  learning_rate: float = 1e-3  # peak.
  schedule: str = "cosine"  # constant | cosine | linear, after the warm-up.
  final_fraction: float = 0.1  # of the peak, at the last step.
  warmup_steps: int = 20
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  max_grad_norm: float = 1.0  # 0 does not clip.


@dataclasses.dataclass(frozen=True)
class SFTSection:
  """Stage `sft`: fine-tuning on demonstrations."""

  steps: int = 600
  batch_size: int = 32  # packed rows a step.
  accumulation: int = 1  # micro-batches a step.
  milestones: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)  # fractions whose checkpoints are kept.
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ReferenceSection:
  """Which checkpoint is pi_ref."""

  # midrun: a milestone of the SFT run | half_data: a run of its own | ema: the moving average of
  # the SFT weights | ensemble_logmeanexp, ensemble_mean_logp: several milestones as one.
  kind: str = "midrun"
  # midrun: of the SFT steps, among sft.milestones; half_data: of the training demonstrations.
  fraction: float = 0.5
  fractions: tuple[float, ...] = (0.25, 0.5)  # of the ensembles' members, among sft.milestones.
  ema_decay: float = 0.99  # of the moving average a step; it lags decay / (1 - decay) steps.
  # none | validation | snr: how midrun's fraction is chosen among sft.milestones.
  select: str = "none"
  num_prompts: int = 64  # training prompts on which references are measured; 0 measures nothing.


@dataclasses.dataclass(frozen=True)
class DPRSection:
  """Stage `dpr`: Dense-Path REINFORCE. Its control `continued_sft` shares steps and optimizer."""

  steps: int = 100
  batch_size: int = 64  # rollouts a step.
  samples_per_prompt: int = 1  # adjacent rollouts that share a prompt and its prefill.
  slots: int = 0  # rollouts decoded at a time, refilled as they end; 0 decodes all at once.
  refill: float = 0.125  # share of the slots that must have ended before others take them.
  accumulation: int = 1  # micro-batches a step.
  max_new_tokens: int = 24
  temperature: float = 1.0  # of the behaviour; anything but 1 biases the gradient.
  top_k: int = 0  # 0 keeps all.
  top_p: float = 1.0
  reward: str = "baseline_relative"  # baseline_relative | log_likelihood | endogenous.
  # Ordered: scale:FACTOR | clip:NATS | clip:LOW:HIGH | zscore | mask_unsure:NATS | centre.
  transforms: tuple[str, ...] = ()
  verifier_weight: float = 0.0  # share of eval.verifier's score, on the last token, in the reward.
  beta: float = 1.0  # weight of the KL to SFT; 1 / beta is the extrapolation strength.
  target_kl: float = 0.0  # nats a response; steers beta, which starts as above; 0 keeps it fixed.
  beta_gain: float = 0.1  # of that control; a step changes beta by at most 0.2 of it.
  kl_budget: float = 0.0  # nats a response; the stage ends where the mean KL exceeds it; 0: never.
  beta_ref: float = 0.0  # weight of a KL to ref as well.
  gamma: float = 1.0  # discount.
  # per_token (each reward for its own token, as with gamma = 0) | reward_to_go (the paper's) |
  # full_return.
  returns: str = "per_token"
  baseline: str = "position_mean"  # none | position_mean | leave_one_out | whiten.
  normaliser: str = "tokens"  # tokens | sequences | constant.
  truncated: str = "keep"  # keep | mask: rollouts that end without EOS.
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_steps=5)


@dataclasses.dataclass(frozen=True)
class BaselineSection:
  """Trained systems to compare DPR with, each on its steps, optimizer and number of tokens."""

  # continued_sft | dft | iq_lm (on demonstrations), spin | gsil (on pairs with own samples),
  # reward_to_go | sentence_level | endogenous | log_likelihood (ablations of DPR).
  names: tuple[str, ...] = ("continued_sft",)
  iq_lambda: float = 1.0  # nats; the larger, the weaker the regulariser of IQ-LM.
  spin_beta: float = 0.1  # per nat of the summed log-ratio.
  gsil_kind: str = "bernoulli"  # bernoulli | brier | hinge | kliep | lsif.
  gsil_alpha: float = 0.1  # per nat of the summed log-ratio.


@dataclasses.dataclass(frozen=True)
class EvalSection:
  """Stage `evaluate`: every system on the held-out prompts, sampled at temperature 1 and greedy."""

  num_prompts: int = 256  # held-out prompts; 0 takes all.
  skip_prompts: int = 0  # held-out prompts passed over first: choose settings on others than those.
  batch_size: int = 64  # prompts decoded at a time.
  max_new_tokens: int = 24
  verifier: str = "auto"  # auto | tasks | exact | gsm8k.
  # HF folder, .gguf, or stage of a workdir: the model that the demonstrations were sampled from at
  # temperature 1, its vocabulary that of the run. KLs to it are measured; "" measures nothing.
  expert: str = ""
  # Controls without training: contrastive | weight_extrapolation | low_temperature | resampled.
  controls: tuple[str, ...] = ("contrastive", "weight_extrapolation", "low_temperature")
  contrastive_alpha: float = 0.0  # strength of all but low_temperature; 0 takes 1 / dpr.beta.
  low_temperature: float = 0.5  # of the control that samples from SFT with it.
  candidates: int = 16  # responses of SFT that resampled draws each of its answers from.
  heatmaps: int = 8  # demonstrations and rollouts shown token by token in the report.
  # Held-out demonstrations of which one token is made wrong: do rewards find it? 0: off.
  corrupted_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class SweepSection:
  """Several runs that differ in one field, with what they share done once; see sweep.py."""

  field: str = ""  # dotted, such as dpr.beta; "" runs the config once.
  values: tuple[str, ...] = ()  # as they would be written on the command line; one point each.


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """Device mesh; one axis may be -1, the rest of the devices."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  every: int = 200  # steps between checkpoints of a stage; the last step is always saved.
  keep: int = 1  # latest checkpoints kept, beside the milestones.


@dataclasses.dataclass(frozen=True)
class LogSection:
  every: int = 1  # steps between lines of metrics.jsonl.
  progress: bool = True  # a progress bar on stderr, from process 0.
  tensorboard: bool = True
  profile_steps: str = ""  # FIRST:LAST, steps of each trained stage to trace; "" traces none.


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A run: its seed and its sections."""

  seed: int = 0
  seeds: int = 1  # number of seeds, counted up from `seed`; each gets a workdir of its own.
  model: ModelSection = ModelSection()
  data: DataSection = DataSection()
  sft: SFTSection = SFTSection()
  reference: ReferenceSection = ReferenceSection()
  dpr: DPRSection = DPRSection()
  baseline: BaselineSection = BaselineSection()
  eval: EvalSection = EvalSection()
  sweep: SweepSection = SweepSection()
  mesh: MeshSection = MeshSection()
  checkpoint: CheckpointSection = CheckpointSection()
  log: LogSection = LogSection()


# What may differ between a run and its resumption: it changes results by rounding alone.
RESUMABLE = (
    "mesh", "log", "checkpoint", "model.attention", "model.remat", "model.chunk_size",
    "model.logits_budget", "dpr.slots", "dpr.refill",
)

BASELINES = (
    "continued_sft", "dft", "iq_lm", "spin", "gsil", "reward_to_go", "sentence_level",
    "endogenous", "log_likelihood",
)
CONTROLS = ("contrastive", "weight_extrapolation", "low_temperature", "resampled")

_CHOICES = {
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ATTENTION,
    "data.format": ("auto", "messages", "prompt_response", "alpaca", "sharegpt", "gsm8k"),
    "data.on_empty": ("error", "drop"),
    "data.train_on": ("all", "last"),
    "data.overlong": ("drop", "truncate", "error"),
    "data.overlong_prompt": ("error", "drop"),
    "reference.kind": ("midrun", "half_data", "ema", *ENSEMBLES),
    "reference.select": ("none", "validation", "snr"),
    "baseline.gsil_kind": ("bernoulli", "brier", "hinge", "kliep", "lsif"),
    "dpr.reward": ("baseline_relative", "log_likelihood", "endogenous"),
    "dpr.returns": ("reward_to_go", "full_return", "per_token"),
    "dpr.baseline": ("none", "position_mean", "leave_one_out", "whiten"),
    "dpr.normaliser": ("tokens", "sequences", "constant"),
    "dpr.truncated": ("keep", "mask"),
    "eval.verifier": ("auto", "tasks", "exact", "gsm8k"),
    "sft.optimizer.schedule": ("constant", "cosine", "linear"),
    "dpr.optimizer.schedule": ("constant", "cosine", "linear"),
}

# Inclusive bounds (low, high or None).
_BOUNDS = {
    "seed": (0, None),
    "seeds": (1, None),
    "model.keep_layers": (0, None),
    "model.chunk_size": (0, None),
    "model.logits_budget": (0.001, None),
    "data.corrupt": (0, 1),
    "data.max_demos": (0, None),
    "data.holdout": (1, None),
    "data.num_demos": (1, None),
    "data.row_length": (2, None),
    "data.prompt_length": (1, None),
    "sft.steps": (1, None),
    "sft.batch_size": (1, None),
    "sft.accumulation": (1, None),
    "dpr.steps": (0, None),
    "dpr.batch_size": (1, None),
    "dpr.samples_per_prompt": (1, None),
    "dpr.slots": (0, None),
    "dpr.refill": (0, 1),
    "dpr.accumulation": (1, None),
    "dpr.max_new_tokens": (1, None),
    "dpr.temperature": (0, None),
    "dpr.top_k": (0, None),
    "dpr.top_p": (0, 1),
    "dpr.beta": (0, None),
    "dpr.beta_ref": (0, None),
    "baseline.iq_lambda": (1e-6, None),
    "baseline.spin_beta": (1e-6, None),
    "baseline.gsil_alpha": (1e-6, None),
    "dpr.gamma": (0, 1),
    "dpr.verifier_weight": (0, 1),
    "dpr.target_kl": (0, None),
    "dpr.beta_gain": (0, 1),
    "dpr.kl_budget": (0, None),
    "reference.ema_decay": (0, 0.999999),
    "reference.num_prompts": (0, None),
    "eval.num_prompts": (0, None),
    "eval.skip_prompts": (0, None),
    "eval.batch_size": (1, None),
    "eval.max_new_tokens": (1, None),
    "eval.contrastive_alpha": (0, None),
    "eval.low_temperature": (0, None),
    "eval.candidates": (2, None),
    "eval.heatmaps": (0, None),
    "eval.corrupted_tokens": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
    "log.every": (1, None),
    **{f"mesh.{axis}": (-1, None) for axis in ("data", "fsdp", "tensor")},
    **{
        f"{stage}.optimizer.{name}": bounds
        for stage in ("sft", "dpr")
        for name, bounds in {
            "learning_rate": (0, None),
            "final_fraction": (0, 1),
            "warmup_steps": (0, None),
            "weight_decay": (0, None),
            "b1": (0, 0.99999),
            "b2": (0, 0.999999),
            "eps": (0, None),
            "max_grad_norm": (0, None),
        }.items()
    },
}


def default_config() -> ml_collections.ConfigDict:
  """All fields at their defaults; a configs/*.py starts from it."""
  fields = dataclasses.asdict(RunConfig())
  # Said once, in the section above the shape; or decided where it is used.
  for name in ("dtype", "remat", "attention", "lora", "scan_layers"):
    del fields["model"]["shape"][name]
  return ml_collections.ConfigDict(fields)


def _convert(value: Any, kind: Any, where: str) -> Any:
  """`value` as the type of its field; UserError naming the field where it is another."""
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, list | tuple):
      raise UserError(f"config.{where}={value!r} must be a list")
    if all(isinstance(v, str) for v in value):  # --config.data.tasks=add,sort is one string.
      value = [part for v in value for part in v.split(",") if part]
    element = typing.get_args(kind)[0]
    return tuple(_convert(v, element, f"{where}[{i}]") for i, v in enumerate(value))
  numbers = (int, float) if kind is float else kind
  if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f"config.{where}={value!r} must be of type {kind.__name__}")
  if kind is float and not math.isfinite(value):
    raise UserError(f"config.{where}={value!r} must be a finite number")
  return kind(value)


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same way in seconds on a CPU: what `configs/NAME.py:debug` returns.

  A random model of the same family (its flags, pattern and kind of rope stay), the built-in
  tasks, and few steps. The byte-level tokenizer replaces that of the weights.
  """
  model, shape = config.model, config.model.shape
  model.pretrained, model.keep_layers = "", 0
  ratio = min(2, shape.num_heads // shape.num_kv_heads)
  # One whole pattern and a rest, so that both scanned groups are there.
  shape.num_layers = len(shape.layer_pattern) + 1
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.head_dim = 0, 32, 64, 16
  shape.num_heads, shape.num_kv_heads = 2, 2 // ratio
  shape.max_length = 256
  shape.window = min(shape.window, 16)
  if shape.embed_scale != 1.0:
    shape.embed_scale = shape.hidden_size**0.5
  if model.lora.rank:
    model.lora.rank = 2
  config.data.demos, config.data.template = "", ""
  config.data.row_length, config.data.prompt_length = 64, 32
  config.data.num_demos, config.data.holdout = 400, 32
  config.sft.steps, config.sft.batch_size, config.sft.accumulation = 20, 8, 1
  config.reference.num_prompts = 16
  config.dpr.steps, config.dpr.batch_size, config.dpr.accumulation = 4, 16, 1
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 20
  config.eval.num_prompts, config.eval.batch_size, config.eval.heatmaps = 32, 16, 2
  config.eval.corrupted_tokens, config.eval.expert = 32, ""
  config.checkpoint.every = 10
  return config


def _build(cls, values: Mapping[str, Any], prefix: str):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise UserError(f"config.{prefix}{name} is not a field; known: {', '.join(sorted(fields))}")
  out = {}
  for name, field in fields.items():
    if name not in values:
      continue
    value, kind = values[name], field.type
    if isinstance(kind, types.UnionType):  # "Section | None"
      kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
      if value is None:
        continue
    where = f"{prefix}{name}"
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping):
        raise UserError(f"config.{where}={value!r} is a section; set its fields")
      out[name] = _build(kind, value, f"{where}.")
    else:
      out[name] = _convert(value, kind, where)
  try:
    return cls(**out)
  except ValueError as e:  # What a section checks of itself, such as a ModelConfig.
    raise UserError(f"config.{prefix.rstrip('.')}: {e}") from None


def _get(config: RunConfig, path: str):
  for name in path.split("."):
    config = getattr(config, name)
  return config


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> RunConfig:
  """ConfigDict (or its JSON) -> validated RunConfig.

  Raises:
    UserError: an unknown field, a wrong type, a value out of its range; names the field.
  """
  values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
  sweep = values.get("sweep")
  if isinstance(sweep, Mapping) and isinstance(sweep.get("values"), list | tuple):
    # --config.sweep.values=0.5,2 arrives as numbers.
    values = {**values, "sweep": {**sweep, "values": [str(v) for v in sweep["values"]]}}
  run = _build(RunConfig, values, "")
  for path, known in _CHOICES.items():
    if _get(run, path) not in known:
      raise UserError(f"config.{path}={_get(run, path)!r} is not one of {', '.join(known)}")
  for path, (low, high) in _BOUNDS.items():
    value = _get(run, path)
    if value < low or (high is not None and value > high):
      raise UserError(
          f"config.{path}={value} is out of range; it must be at least {low}"
          + (f" and at most {high}" if high is not None else "")
      )
  if run.dpr.batch_size % run.dpr.samples_per_prompt:
    raise UserError(
        f"config.dpr.batch_size={run.dpr.batch_size} is not a multiple of "
        f"config.dpr.samples_per_prompt={run.dpr.samples_per_prompt}"
    )
  for stage in ("sft", "dpr"):
    section = getattr(run, stage)
    if section.batch_size % section.accumulation:
      raise UserError(
          f"config.{stage}.batch_size={section.batch_size} is not a multiple of "
          f"config.{stage}.accumulation={section.accumulation}"
      )
  if run.dpr.baseline == "leave_one_out" and run.dpr.samples_per_prompt < 2:
    raise UserError(
        "config.dpr.baseline=leave_one_out needs config.dpr.samples_per_prompt of at least 2"
    )
  for field, known in (("eval.controls", CONTROLS), ("baseline.names", BASELINES)):
    for name in _get(run, field):
      if name not in known:
        raise UserError(f"config.{field}: {name!r} is not one of {', '.join(known)}")
  if run.sweep.values and not run.sweep.field:
    raise UserError("config.sweep.values are given without config.sweep.field, such as dpr.beta")
  if run.model.keep_layers and not run.model.pretrained:
    raise UserError(f"config.model.keep_layers={run.model.keep_layers} chooses among layers of "
                    "config.model.pretrained; set config.model.shape.num_layers of a random model")
  _check_rewards(run)
  if run.dpr.beta == 0 and not run.eval.contrastive_alpha:
    raise UserError(
        "config.dpr.beta=0 has no matching strength 1 / beta for the controls without training; "
        "set config.eval.contrastive_alpha"
    )
  if run.data.demos:
    for name, neutral in (("corrupt", 0.0), ("tasks", ())):
      if getattr(run.data, name) != neutral:
        raise UserError(f"config.data.{name} is of the built-in tasks; it has no meaning with "
                        f"config.data.demos={run.data.demos}")
    if run.eval.verifier == "tasks":
      raise UserError("config.eval.verifier=tasks is of the built-in tasks; use exact or gsm8k "
                      f"with config.data.demos={run.data.demos}")
  if run.eval.skip_prompts + max(run.eval.num_prompts, 1) > run.data.holdout:
    skipped = f" beyond config.eval.skip_prompts={run.eval.skip_prompts}"
    raise UserError(
        f"config.eval.num_prompts={run.eval.num_prompts}{skipped if run.eval.skip_prompts else ''} "
        f"exceeds config.data.holdout={run.data.holdout}"
    )
  if run.dpr.top_p == 0:
    raise UserError("config.dpr.top_p=0 keeps no token; use 1.0, which keeps all")
  if run.dpr.temperature == 0:
    raise UserError("config.dpr.temperature=0 never explores; use 1.0, the policy itself")
  return run


def _check_rewards(run: RunConfig) -> None:
  """Fields of the reward and of the reference that do not go together."""
  section, reference = run.dpr, run.reference
  transforms.parse(section.transforms)
  if "centre" in section.transforms and section.reward == "endogenous":
    # It holds V(s_{t+1}), which is known for the sampled token alone.
    raise UserError("config.dpr.transforms: centre has no meaning with "
                    "config.dpr.reward=endogenous; leave it out")
  if section.reward == "endogenous" and (section.returns == "per_token" or section.gamma == 0):
    # A constant added to the logits of a state moves reward from one token to the one before.
    raise UserError("config.dpr.reward=endogenous says nothing of one token alone; set "
                    "config.dpr.returns=reward_to_go and a config.dpr.gamma above 0")
  if section.gamma != 1 and section.returns != "reward_to_go":
    raise UserError(f"config.dpr.gamma={section.gamma} discounts a reward-to-go, not "
                    f"config.dpr.returns={section.returns}; set reward_to_go")
  if section.target_kl and not section.beta:
    raise UserError(f"config.dpr.target_kl={section.target_kl} multiplies config.dpr.beta, which "
                    "must be above 0")
  if reference.kind == "ema" and not reference.ema_decay:
    raise UserError("config.reference.ema_decay=0 averages nothing: ref would be sft, and every "
                    "reward 0")
  if reference.kind in ENSEMBLES and len(set(reference.fractions)) < 2:
    raise UserError(f"config.reference.fractions={reference.fractions}: "
                    f"config.reference.kind={reference.kind} needs at least two")
  if reference.select != "none" and reference.kind != "midrun":
    raise UserError(f"config.reference.select={reference.select} chooses among milestones; it "
                    f"needs config.reference.kind=midrun, not {reference.kind}")
  if reference.select != "none" and not reference.num_prompts:
    raise UserError(f"config.reference.select={reference.select} needs "
                    "config.reference.num_prompts of at least 1")


def to_json(config: RunConfig) -> dict[str, Any]:
  """A plain dict for config.json."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> str | None:
  """'field: old -> new' of the first field that differs outside of RESUMABLE, or None."""
  for name in sorted({*old, *new}):
    path = f"{prefix}{name}"
    if path in RESUMABLE:
      continue
    a, b = old.get(name), new.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found = first_difference(a, b, f"{path}.")
      if found:
        return found
    elif a != b:
      return f"config.{path}: {a!r} there, {b!r} here"
  return None
