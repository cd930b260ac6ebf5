"""One seed of a run: what everything in it shares, its set-up, and the checks of its input."""

import collections
import dataclasses
import datetime
import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm

from dpr_jax import config as config_lib
from dpr_jax import inputs, sharding, weights
from dpr_jax.agreement import agree
from dpr_jax.config.fields import kind_class, title_of
from dpr_jax.config.run_config import values_in
from dpr_jax.data.dataset import Dataset, build_dataset
from dpr_jax.data.templates import stop_ids
from dpr_jax.errors import UserError, naming
from dpr_jax.evaluation.judges import Judge
from dpr_jax.evaluation.responses import Responder
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.keys import root_key
from dpr_jax.loading import (
    base_variables,
    compute_dtype,
    describe_checkpoint,
    fingerprint_checkpoint,
    fresh_adapter,
    load_checkpoint,
    split_checkpoint,
    stage_variables,
)
from dpr_jax.methods.base import Method
from dpr_jax.models import Transformer
from dpr_jax.models.attention import resolve_backend
from dpr_jax.models.config import COMPUTATION, ModelConfig
from dpr_jax.models.layer_pruning import pruned_config
from dpr_jax.paths import in_bucket
from dpr_jax.references.base import Reference
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.stopping import last_step
from dpr_jax.workdir import RESERVED, Workdir

BENCHMARKS = "dpr_jax.evaluation.benchmarks"


@dataclasses.dataclass(frozen=True)
class Run:
  """What all stages of one seed share."""

  config: config_lib.RunConfig
  workdir: Workdir
  mesh: jax.sharding.Mesh
  tokenizer: Any
  model: Transformer
  stop_ids: tuple[int, ...]
  data: Dataset
  day: datetime.date = dataclasses.field(default_factory=inputs.today)  # that prompts name.
  _held: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

  @property
  def dtype(self) -> str:
    """The compute dtype, in which sft and ref are held."""
    return self.model.cfg.dtype

  def rng(self, name: str) -> jax.Array:
    return root_key(self.config.seed, name)

  # --- Variables ---------------------------------------------------------------------------------

  def initial_variables(self, dtype: str) -> Any:
    """What SFT starts from; what is trained has `dtype`."""
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

  def checkpoint(self, stage: str, step: int, dtype: str, part: str = "variables") -> Any:
    """Variables of one checkpoint of a stage.

    Args:
      part: "variables", or "ema" for their moving average.
    """
    directory = self.workdir.stage(stage)
    return stage_variables(
        directory, step, self.model.cfg, self.mesh, dtype, self.frozen, part
    )

  def sft_float32(self) -> Any:
    """Where every method starts: the last SFT parameters as they were trained, in own buffers."""
    return self.checkpoint("sft", self.config.sft.steps, "float32")

  def sft(self) -> Any:
    """The last SFT parameters in the compute dtype; held until `release`."""
    return self.hold("sft", lambda: self.checkpoint("sft", self.config.sft.steps, self.dtype))

  def reference(self) -> Reference:
    """pi_ref in the compute dtype; held until `release`."""

    def load():
      with naming("config.reference"):
        return self.config.reference(self, self.dtype)

    return self.hold("ref", load)

  def result(self, name: str, dtype: str = "") -> Any:
    """What the stage of a method has trained, in the compute dtype if no other is named."""
    steps = self.config.methods[name].budget(self.config).steps
    return self.checkpoint(name, last_step(self.workdir.stage(name), steps), dtype or self.dtype)

  def other_checkpoint(self, spec: str, dtype: str) -> Any:
    """Variables of a CKPT from outside of the run.

    Raises:
      UserError: no such checkpoint, or one of another vocabulary or shape.
    """
    other = load_checkpoint(spec, self.mesh, dtype)
    if other.tokenizer.get_vocab() != self.tokenizer.get_vocab():
      raise UserError(f"{spec} has another vocabulary than the run")
    if found := other.model.cfg.difference(self.model.cfg, (*COMPUTATION, "lora")):
      raise UserError(f"{spec} differs from the run's model in {found}")
    return other.variables

  def fine_tune(self, name: str, rows: Any, steps: int) -> None:
    """Trains the stage `name` on other `PackedRows` as SFT trains on the run's."""
    from dpr_jax.methods.sft import fine_tune

    section = dataclasses.replace(self.config.sft, steps=steps, milestones=())
    fine_tune(self, name, lambda: rows, section)

  def hold(self, name: str, load: Callable[[], Any]) -> Any:
    """What `load` gives, held under a name until `release`."""
    if name not in self._held:
      self._held[name] = load()
    return self._held[name]

  def release(self) -> None:
    """Forgets sft and ref, before something else needs the memory."""
    self._held.clear()

  # --- Measuring ---------------------------------------------------------------------------------

  @functools.cached_property
  def benchmark(self) -> Any:
    """The benchmark that scores responses: that of the config, else one that fits the data."""
    return self.config.eval.benchmark or kind_class(BENCHMARKS, self.data.benchmark)()

  @property
  def scorer(self) -> Scorer:
    return Scorer(self.model, self.mesh, self.config.eval.batch_size)

  @property
  def responder(self) -> Responder:
    section = self.config.eval
    return Responder(
        self.model, self.mesh, section.batch_size, self.config.data.prompt_length,
        section.max_new_tokens, self.stop_ids,
    )

  def metrics(self, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    return read_metrics(self.workdir.stage(stage) / "metrics.jsonl")

  # --- Logging -----------------------------------------------------------------------------------

  def log(self, text: str) -> None:
    """A line beside the progress bars, from process 0."""
    if self.config.log.progress and jax.process_index() == 0:
      print(text, file=sys.stderr)

  def bar(self, name: str, total: int, unit: str):
    """A progress bar, from process 0."""
    hidden = not self.config.log.progress or jax.process_index() != 0
    return tqdm.tqdm(
        total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, mininterval=0.5
    )


def computed(section: config_lib.ModelSection, cfg: ModelConfig, dtype: str) -> ModelConfig:
  """A pretrained or random shape, with what config.model says of layers, LoRA and computation.

  Raises:
    UserError: more layers are kept than there are.
  """
  with naming("config.model.keep_layers"):
    cfg = pruned_config(cfg, section.keep_layers)
  how = {name: getattr(section, name) for name in ("remat", "attention", "lora", "logits_budget")}
  return dataclasses.replace(cfg, dtype=dtype, **how)


def check_lengths(config: config_lib.RunConfig, max_length: int) -> None:
  """Raises UserError where rows or rollouts are longer than the model was made for, in tokens."""
  budgets = [m.budget(config).max_new_tokens for m in config.compared().values() if m.trained]
  new = max([*budgets, config.eval.max_new_tokens])
  for field, length in (
      ("data.row_length", config.data.row_length),
      ("data.prompt_length + max_new_tokens", config.data.prompt_length + new),
  ):
    if length > max_length:
      raise UserError(
          f"config.{field}={length} exceeds the {max_length} tokens that the model was made for"
      )


def build_model(
    config: config_lib.RunConfig, tokenizer: Any = None
) -> tuple[Any, Transformer, tuple[int, ...], dict[str, Any]]:
  """(tokenizer, model, stop ids, generation config of the weights).

  Args:
    tokenizer: that of a run that is resumed; None makes that of a run that begins today.

  Raises:
    UserError: unreadable weights or tokenizer, or a length beyond what the model was trained for.
  """
  section = config.model
  generation_config = {}
  if tokenizer is None:
    tokenizer = inputs.make_tokenizer(
        section.pretrained, config.data.template, inputs.today()
    )
  if section.pretrained:
    generation_config = weights.load_generation_config(section.pretrained)
    cfg = weights.load_config(section.pretrained)
  else:
    size = section.shape.vocab_size or len(tokenizer)
    cfg = dataclasses.replace(section.shape, vocab_size=size)
    if cfg.vocab_size < len(tokenizer):
      raise UserError(
          f"config.model.shape.vocab_size={cfg.vocab_size} is below the {len(tokenizer)} tokens of "
          "the tokenizer; 0 takes that number"
      )
  cfg = computed(section, cfg, compute_dtype(section.dtype))
  with naming("config.model"):
    resolve_backend(cfg, config.data.row_length)  # Refuses here what the first step would refuse.
  check_lengths(config, cfg.max_length)
  ends = stop_ids(tokenizer, generation_config)
  return tokenizer, Transformer(cfg), ends, generation_config


def check_expert(config: config_lib.RunConfig, model: Transformer, tokenizer: Any) -> None:
  """Refuses an expert that cannot be compared with the run's model; reads no weights of it.

  Raises:
    UserError: no such checkpoint, another vocabulary, or one made for shorter sequences.
  """
  spec = config.eval.expert
  with naming("config.eval.expert"):
    cfg, theirs = describe_checkpoint(spec)
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


def check_mesh(config: config_lib.RunConfig, mesh: Any) -> None:
  """Raises UserError naming the batch that a mesh (concrete or abstract) does not divide."""
  sft = config.sft
  with naming("config.sft"):
    rows = sft.batch_size // sft.accumulation
    sharding.check_rows(mesh, "batch_size / accumulation", rows)
  with naming("config.eval"):
    sharding.check_rows(mesh, "batch_size", config.eval.batch_size)
  for name, method in config.compared().items():
    with naming(f"config.methods.{name}"):
      method.check_mesh(mesh, config)


def absolute(path: str) -> str:
  """The path from the root, so that it is found from any directory; "" stays ""."""
  return os.path.abspath(path) if path and not in_bucket(path) else path


def labels_of(methods: Mapping[str, Method]) -> dict[str, str]:
  """How tables call the methods: by label, else by title, with the name where titles are equal."""
  titles = {name: method.label or title_of(method) for name, method in methods.items()}
  shared = {title for title, n in collections.Counter(titles.values()).items() if n > 1}
  return {n: f"{title} ({n})" if title in shared else title for n, title in titles.items()}


def describe(config: config_lib.RunConfig) -> dict[str, Any]:
  """What results and report say of the config's values, so that they need no code of a user."""
  compared = config.compared()
  subjects = {n for n, m in compared.items() if m.subject} | set(config.compare[-1:])
  own = {n: m.own_budget() for n, m in compared.items() if m.trained}
  return {
      "reference": config.reference.describe(),
      "always": {"base": "Base model", "ref": "Reference", "sft": "SFT"},
      "labels": labels_of(compared),
      "subjects": [name for name in config.compare if name in subjects],
      "own_budget": {name: text for name, text in own.items() if text},
  }


def set_up(
    config: config_lib.RunConfig,
    workdir: Workdir,
    mesh: jax.sharding.Mesh,
    like: Run | None = None,
    day: datetime.date | None = None,
    evaluated: bool = True,
    check: Callable[[Run], None] = lambda run: None,
) -> Run:
  """Everything that can be wrong with the input shows here, before anything is written.

  Args:
    like: a run set up before, whose data are taken if they are the same.
    day: what a chat template writes that writes the date, unless the run began before; today.
    evaluated: whether anything is sampled, so that prompts must be held out.
    check: of the caller, before anything is written.
  """

  def read() -> tuple[Run, dict[str, Any]]:
    made = _read(config, workdir, mesh, like, day, evaluated)
    check(made[0])
    return made

  agree(lambda: workdir.check(config))
  workdir.set_aside_damaged()
  run, record = agree(
      read,
      lambda made: {
          "contents of config.data.demos": made[0].data.summary.get("blake2b"),
          **made[1],
      },
      seconds=600.0,  # One host may read its data from a much slower disk than another.
  )
  copied = workdir.has_tokenizer()
  workdir.claim(config, **record)
  if jax.process_index() == 0 and not copied:
    workdir.record(*inputs.save_tokenizer(run.tokenizer, workdir.tokenizer))
  return run


def _read(
    config: config_lib.RunConfig,
    workdir: Workdir,
    mesh: jax.sharding.Mesh,
    like: Run | None,
    day: datetime.date | None,
    evaluated: bool,
) -> tuple[Run, dict[str, Any]]:
  """A run, and what config.json says of its input."""
  check_mesh(config, mesh)
  for name in config.compare:
    if name in RESERVED or not re.fullmatch(r"[A-Za-z]\w*", name):
      raise UserError(f"config.methods.{name}: the name of a method is that of a folder of the "
                      "workdir; use letters, digits and _, and none of its own names")
  then = workdir.read_config().get("inputs", {}) if workdir.config_file.exists() else {}
  day = like.day if like is not None else day or inputs.today()
  if "date" in then:
    day = datetime.date.fromisoformat(then["date"])
  tokenizer = workdir.load_tokenizer() if workdir.has_tokenizer() else inputs.make_tokenizer(
      config.model.pretrained, config.data.template, day
  )
  tokenizer, model, ends, generation_config = build_model(config, tokenizer)
  if config.eval.expert:
    check_expert(config, model, tokenizer)
  same = lambda c: (c.data, c.model, c.seed)
  if like is not None and same(config) == same(like.config):
    data = like.data
  else:
    with naming("config.data"):
      # The tokenizer has the template.
      section = dataclasses.replace(config.data, template="")
      data = build_dataset(section, tokenizer, config.seed, prompts=evaluated)
  skip, found = config.eval.skip_prompts, len(data.heldout.tokens)
  if skip >= found and evaluated:
    raise UserError(
        f"config.eval.skip_prompts={skip} leaves nothing to evaluate on: of config.data.holdout="
        f"{config.data.holdout} there are {found} prompts within config.data.prompt_length"
    )
  sources = (config.model.pretrained, config.data.template)
  found = inputs.collect(*sources, day, data.arrays(), then)
  others = {f"config.reference.{n}": path for n, path in config.reference.checkpoints().items()}
  others |= {"config.eval.expert": config.eval.expert} if config.eval.expert else {}
  for name, spec in others.items():
    if name not in then or split_checkpoint(spec)[0].exists():  # Else it has moved.
      with naming(name):
        found[name] = fingerprint_checkpoint(spec)
  for path, judge in values_in(config):
    if isinstance(judge, Judge):
      name = f"config.{path}"
      try:
        with naming(name):
          if judge.everywhere or jax.process_index() == 0:  # Others may not reach it, and need not.
            judge.prepare(tokenizer)
        found[name] = judge.identity()
      except UserError:
        if name not in then:
          raise  # Else it has moved, which matters to a stage that still needs it alone.
  record = {
      "inputs": {**then, **found},
      "model": {
          "source": config.model.pretrained or "random",
          "pretrained": absolute(config.model.pretrained),
          "generation_config": generation_config,
          "num_params": model.cfg.num_params,
          "config": model.cfg.to_dict(),
          "stop_ids": list(ends),
      },
      "data": {**data.summary, "template": absolute(config.data.template)},
      "devices": {"platform": jax.default_backend(), "count": jax.device_count()},
      "described": describe(config),
  }
  return Run(config, workdir, mesh, tokenizer, model, ends, data, day), record
