"""Where variables come from: pretrained or random ones to start with, checkpoints later.

A CKPT argument of an entry point is a Hugging Face folder, a .gguf file, or a stage of a workdir:
DIR/sft, DIR/sft@0.5 (a milestone), DIR/dpr, DIR/seed_0/sft.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dpr_jax import fingerprints, inputs
from dpr_jax.config.sections import ModelSection, SFTSection
from dpr_jax.config.values import build
from dpr_jax.errors import UserError, naming
from dpr_jax.keys import root_key
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.layer_pruning import pruned_params
from dpr_jax.models.lora import LoRA, split_trainable
from dpr_jax.models.variables import abstract_variables, cast, random_adapter, random_variables
from dpr_jax.paths import Path, absolute, as_path, refusal
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.workdir import Workdir


def compute_dtype(dtype: str) -> str:
  """auto: bfloat16 on TPU and GPU, float32 on CPU."""
  if dtype != "auto":
    return dtype
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def base_variables(
    section: ModelSection, cfg: ModelConfig, mesh: jax.sharding.Mesh, seed: int, dtype: str,
) -> dict[str, Any]:
  """{"params"}: pretrained weights, else random ones of the run's seed, in `dtype`."""
  from dpr_jax import weights

  if section.pretrained:
    whole, params = weights.load_pretrained(section.pretrained, dtype=dtype, mesh=mesh)
    return {"params": pruned_params(params, whole, section.keep_layers)}
  plain = dataclasses.replace(cfg, lora=LoRA())
  variables = random_variables(plain, mesh, root_key(seed, "init"))
  return variables if dtype == "float32" else cast(variables, dtype)


def fresh_adapter(
    cfg: ModelConfig, mesh: jax.sharding.Mesh, seed: int, dtype: str
) -> dict[str, Any]:
  """{"lora"}: an adapter that changes nothing yet, in `dtype`."""
  adapter = {"lora": random_adapter(cfg, mesh, root_key(seed, "init"))}
  return adapter if dtype == "float32" else cast(adapter, dtype)


def stage_variables(
    directory: Path, step: int, cfg: ModelConfig, mesh: jax.sharding.Mesh, dtype: str,
    frozen: Mapping[str, Any], part: str = "variables",
) -> dict[str, Any]:
  """The variables of one checkpoint of a stage: what was trained in `dtype`, beside `frozen`.

  Args:
    part: "variables", or "ema" for their moving average.
  """
  trainable, _ = split_trainable(abstract_variables(cfg, mesh, dtype))
  with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
    return {**frozen, **checkpoints.restore_variables(step, trainable, part)}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model ready to score or to answer."""

  model: Transformer
  variables: Any
  tokenizer: Any
  stop_ids: tuple[int, ...]
  template: str  # "" for the tokenizer's own, or the path of a .jinja chat template.
  generation_config: Mapping[str, Any]  # that of the pretrained weights, {} without.
  base: str = ""  # path of the pretrained weights it started from, "" for none.
  keep_layers: int = 0  # how many layers of the base it has; 0 for all.
  workdir: Path | None = None  # of the run it is a stage of.


def split_checkpoint(spec: str) -> tuple[Path, str]:
  """'DIR/sft@0.5' -> (DIR/sft, '0.5'), or '@ema'; no fraction gives ''."""
  path, at, fraction = spec.rpartition("@")
  try:  # An @ may be the path's own.
    whole = not at or not path or "/" in fraction or as_path(spec).exists()
  except OSError as e:
    raise UserError(f"{spec[:200]}: no such checkpoint: {refusal(e)}") from None
  return absolute(spec if whole else path), "" if whole else fraction


def is_stage(path: Path) -> bool:
  return (path / "checkpoints").is_dir() and (path.parent / "config.json").is_file()


def stage_step(path: Path, fraction: str, record: Mapping[str, Any]) -> int:
  """Which checkpoint of a stage is meant: the one at a fraction of its steps, or the newest."""
  with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
    steps = checkpoints.steps()
  if not steps:
    raise UserError(f"{path}: no finished checkpoint yet")
  if fraction in ("", "ema"):
    return steps[-1]
  try:
    value = float(fraction)
  except ValueError:
    raise UserError(f"{path}@{fraction}: what follows '@' must be a fraction in (0, 1], or "
                    "ema") from None
  if path.name != "sft":
    raise UserError(f"{path}@{fraction}: only the sft stage keeps milestones")
  section = build(SFTSection, record["config"]["sft"], "sft.")
  with naming(f"{path}@{fraction}"):
    step = section.milestone_step(value)
  if step not in steps:
    there = [f for f, s in section.milestone_steps().items() if s in steps]
    raise UserError(f"{path}@{fraction}: no checkpoint there yet; finished fractions: {there}")
  return step


def _check_pretrained(spec: str, path: Path, fraction: str) -> None:
  if fraction or not path.exists():
    raise UserError(f"{spec}: no such checkpoint; expected a Hugging Face folder, a .gguf file, or "
                    "a stage of a workdir (DIR/sft, DIR/sft@0.5, DIR/dpr)")


def fingerprint_checkpoint(spec: str) -> dict[str, str]:
  """Fingerprints of what a CKPT argument names, by file; of a stage, those of one checkpoint.

  Raises:
    UserError: nothing of that kind is found.
  """
  path, fraction = split_checkpoint(spec)
  if is_stage(path):
    step = stage_step(path, fraction, Workdir(path.parent).read_config())
    meta = path / "checkpoints" / str(step) / "meta" / "metadata"  # Has those of all arrays.
    return {f"the checkpoint of step {step}": fingerprints.of_file(meta)}
  _check_pretrained(spec, path, fraction)
  return inputs.pretrained_files(path)


def _in_one_line(load: Callable[..., Any]) -> Callable[..., Any]:
  """Turns what a file that is missing or half written raises into a UserError."""

  @functools.wraps(load)
  def loaded(spec: str, *args: Any, **kwargs: Any) -> Any:
    try:
      return load(spec, *args, **kwargs)
    except (OSError, LookupError) as e:
      raise UserError(f"{spec} cannot be read ({type(e).__name__}: {e}); if its run is writing it "
                      "at the moment, try again") from e

  return loaded


@_in_one_line
def describe_checkpoint(spec: str) -> tuple[ModelConfig, Any]:
  """(ModelConfig, tokenizer) of what a CKPT argument names, without reading weights.

  Raises:
    UserError: as `load_checkpoint`, as far as it shows without the weights.
  """
  from dpr_jax import weights

  path, fraction = split_checkpoint(spec)
  if is_stage(path):
    workdir = Workdir(path.parent)
    record = workdir.read_config()
    stage_step(path, fraction, record)
    cfg = ModelConfig.from_dict(record["model"]["config"])
    return cfg, workdir.load_tokenizer()
  _check_pretrained(spec, path, fraction)
  return weights.load_config(path), weights.load_tokenizer(path)


@_in_one_line
def load_checkpoint(
    spec: str,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    beside: LoadedModel | None = None,
) -> LoadedModel:
  """Loads what a CKPT argument names, with parameters and activations in `dtype`.

  Args:
    spec: a Hugging Face folder, a .gguf file, or a stage of a workdir: DIR/sft, DIR/sft@0.5,
      DIR/sft@ema, DIR/dpr.
    beside: a model loaded before; a LoRA stage of the same run takes the base from it.

  Raises:
    UserError: nothing of that kind is found.
  """
  from dpr_jax import weights
  from dpr_jax.data.templates import stop_ids

  path, fraction = split_checkpoint(spec)
  if is_stage(path):
    workdir = Workdir(path.parent)
    record = workdir.read_config()
    cfg = dataclasses.replace(
        ModelConfig.from_dict(record["model"]["config"]),
        dtype=dtype,
        attention="auto",  # The run may have been on another platform.
    )
    step = stage_step(path, fraction, record)
    # The paths of config.json are as they were typed, from another directory perhaps.
    section = dataclasses.replace(
        build(ModelSection, record["config"]["model"], "model."),
        pretrained=record["model"]["pretrained"],
    )
    frozen = {}
    if cfg.lora.rank and beside is not None and beside.workdir == workdir.path:
      frozen = {"params": beside.variables["params"]}
    elif cfg.lora.rank:
      inputs.check_base(record)
      frozen = base_variables(section, cfg, mesh, record["seed"], dtype)
    part = "ema" if fraction == "ema" else "variables"
    variables = stage_variables(path, step, cfg, mesh, dtype, frozen, part)
    return LoadedModel(
        model=Transformer(cfg),
        variables=variables,
        tokenizer=workdir.load_tokenizer(),
        stop_ids=tuple(record["model"]["stop_ids"]),
        template="" if "inputs" in record else record["data"]["template"],
        generation_config=record["model"]["generation_config"],
        base=section.pretrained,
        keep_layers=section.keep_layers,
        workdir=workdir.path,
    )
  _check_pretrained(spec, path, fraction)
  cfg, params = weights.load_pretrained(path, dtype=dtype, mesh=mesh)
  tokenizer = weights.load_tokenizer(path)
  generation_config = weights.load_generation_config(path)
  return LoadedModel(
      model=Transformer(dataclasses.replace(cfg, dtype=dtype)),
      variables={"params": params},
      tokenizer=tokenizer,
      stop_ids=stop_ids(tokenizer, generation_config),
      template="",
      generation_config=generation_config,
  )
