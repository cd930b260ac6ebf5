"""A run's config: made by `default_config`, changed by files and flags, checked by `resolve`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dpr_jax.config import sections
from dpr_jax.config.fields import Value, kind_class, kinds, section, setting, slot, slots
from dpr_jax.config.values import Config, build, to_config
from dpr_jax.errors import UserError
from dpr_jax.keys import MAX_SEED
from dpr_jax.models.config import COMPUTATION


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """The fields of a run: its seeds, its reference, its methods, and the sections below."""

  seed: int = setting(
      0, "seed of the data order, the initial weights and sampling", low=0, high=MAX_SEED
  )
  seeds: int = setting(
      1, "number of seeds, counted up from `seed`; each gets a workdir of its own", low=1
  )
  model: sections.ModelSection = section(sections.ModelSection)
  data: sections.DataSection = section(sections.DataSection)
  sft: sections.SFTSection = section(sections.SFTSection)
  reference: Any = slot("dpr_jax.references", "midrun", "the parameters that are pi_ref")
  budget: sections.Budget = section(sections.Budget)
  methods: Mapping[str, Any] = slots("dpr_jax.methods", "systems that a run can compare, by name")
  compare: tuple[str, ...] = setting(
      ("low_temperature", "contrastive", "weight_extrapolation", "continued_sft", "dpr"),
      "names of the methods that this run trains, evaluates and compares; the last is the main one",
  )
  eval: sections.EvalSection = section(sections.EvalSection)
  sweep: sections.SweepSection = section(sections.SweepSection)
  mesh: sections.MeshSection = section(sections.MeshSection, resumable=True)
  checkpoint: sections.CheckpointSection = section(sections.CheckpointSection, resumable=True)
  log: sections.LogSection = section(sections.LogSection, resumable=True)

  def compared(self) -> dict[str, Any]:
    """The methods of `compare`, in that order."""
    return {name: self.methods[name] for name in self.compare}


def default_config() -> Config:
  """All fields at their defaults, unlocked; a file of configs/ starts from it."""
  config = to_config(RunConfig())
  # Declared once, in the section above the shape; or decided where it is used.
  for name in (*COMPUTATION, "lora"):
    del config.model.shape[name]
  return config


def resolve(config: Config | Mapping[str, Any]) -> RunConfig:
  """A config, or its JSON -> a checked RunConfig.

  Raises:
    UserError: an unknown field, a wrong type, a value out of its bounds, or fields that contradict
      each other; names the fields.
  """
  values = config.to_dict() if isinstance(config, Config) else config
  sweep = values.get("sweep")
  if isinstance(sweep, Mapping) and isinstance(sweep.get("values"), list | tuple):
    # --config.sweep.values=0.5,2 arrives as numbers.
    values = {**values, "sweep": {**sweep, "values": [str(v) for v in sweep["values"]]}}
  run = build(RunConfig, values)
  for i, name in enumerate(run.compare):
    if name not in run.methods:
      raise UserError(f"config.compare: {name!r} is not one of config.methods: "
                      f"{', '.join(sorted(run.methods))}")
    if name in run.compare[:i]:
      raise UserError(f"config.compare: {name!r} is listed twice")
  reserved = {"base", "ref", "sft"} & set(run.methods)
  if reserved:
    raise UserError(f"config.methods.{min(reserved)}: base, ref and sft are systems of every run; "
                    "use another name")
  _check_sections(run)
  _check_columns(run)
  for where, value in values_in(dataclasses.replace(run, methods=run.compared())):
    try:
      value.check(run)
    except ValueError as e:
      raise UserError(f"config.{where}: {e}") from None
  # What no compared method reads is no part of the run.
  read = {n for name, m in run.compared().items() for n in (name, *m.refers())}
  methods = {name: run.methods[name] for name in run.methods if name in read}
  return dataclasses.replace(run, methods=methods)


def values_in(config: Any, prefix: str = "") -> Iterator[tuple[str, Value]]:
  """(path, value) of every `Value` in the fields of a dataclass, each before those in it."""
  for field in dataclasses.fields(config):
    item = getattr(config, field.name)
    below = item if "slots" in field.metadata else {"": item}
    for name, value in below.items():
      path = f"{prefix}{field.name}{'.' if name else ''}{name}"
      if isinstance(value, Value):
        yield path, value
      if dataclasses.is_dataclass(value):
        yield from values_in(value, f"{path}.")


def _check_columns(run: RunConfig) -> None:
  """Raises UserError where two columns of results.json would have one name."""
  # Without a benchmark it is one of the package, chosen when the demonstrations are read.
  chosen = [run.eval.benchmark] if run.eval.benchmark else kinds(sections.BENCHMARKS).values()
  taken = {
      name: "a score of the benchmark"
      for b in chosen if "accuracy" in b.scores for name in b.scores
  }
  for name, metric in run.eval.metrics.items():
    where = f"config.eval.metrics.{name}"
    for column in metric.column_names(name):
      if "/" in column:
        raise UserError(f"{where}: {column!r} must be without '/', which separates a group")
      if column in taken:
        raise UserError(f"{where}: {column} is {taken[column]} already; use another name")
    taken |= dict.fromkeys(metric.column_names(name), f"a column of {where}")


def _check_sections(run: RunConfig) -> None:
  """Fields of different sections that contradict each other."""
  if run.seed + run.seeds - 1 > MAX_SEED:
    raise UserError(f"config.seed={run.seed} leaves no room for config.seeds={run.seeds}; the last "
                    f"one must be at most {MAX_SEED}")
  if run.model.keep_layers and not run.model.pretrained:
    raise UserError(f"config.model.keep_layers={run.model.keep_layers} chooses among layers of "
                    "config.model.pretrained; set config.model.shape.num_layers of a random model")
  if run.data.demos:
    for name, neutral in (
        ("corrupt", 0.0), ("corruption", "answer"), ("minority", 0.0), ("tasks", ())
    ):
      if getattr(run.data, name) != neutral:
        raise UserError(f"config.data.{name} applies to the built-in tasks only, not to "
                        f"config.data.demos={run.data.demos}; set config.data.{name}={neutral}")
  if run.eval.skip_prompts + max(run.eval.num_prompts, 1) > run.data.holdout:
    skipped = f" beyond config.eval.skip_prompts={run.eval.skip_prompts}"
    raise UserError(
        f"config.eval.num_prompts={run.eval.num_prompts}{skipped if run.eval.skip_prompts else ''} "
        f"exceeds config.data.holdout={run.data.holdout}"
    )


def debug_config(config: Config) -> Config:
  """The same run in seconds on a CPU: what `configs/NAME.py:debug` returns.

  A random model of the same family (its flags, pattern and kind of rope stay), the built-in
  tasks, and few steps. The byte-level tokenizer replaces that of the weights.
  """
  model, shape = config.model, config.model.shape
  model.pretrained, model.keep_layers = "", 0
  ratio = min(2, shape.num_heads // shape.num_kv_heads)
  # One whole pattern and a rest, so that there are both scanned groups.
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
  config.budget.steps, config.budget.batch_size, config.budget.accumulation = 4, 16, 1
  config.budget.max_new_tokens = config.eval.max_new_tokens = 20
  config.eval.num_prompts, config.eval.batch_size, config.eval.heatmaps = 32, 16, 2
  config.eval.frontier_prompts, config.eval.frontier_samples = 16, 2
  config.eval.corrupted_tokens, config.eval.reference_prompts, config.eval.expert = 32, 16, ""
  config.checkpoint.every = 10
  return config


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], cls: type | None = RunConfig, prefix: str = ""
) -> str | None:
  """'config.FIELD: old there, new here' of the first field that may not differ on resumption.

  Args:
    old, new: JSON of two configs.
    cls: the dataclass that they are of, whose fields say what may differ.
  """
  fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
  for name in sorted({*old, *new}):
    field, path = fields.get(name), f"{prefix}{name}"
    metadata = field.metadata if field else {}
    if metadata.get("resumable"):
      continue
    a, b = old.get(name), new.get(name)
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
      if a != b:
        return f"config.{path}: {a!r} there, {b!r} here"
      continue
    if "slots" in metadata:
      for n in sorted({*a, *b}):
        x, y = a.get(n), b.get(n)
        if not (isinstance(x, Mapping) and isinstance(y, Mapping)):
          return f"config.{path}.{n}: {x!r} there, {y!r} here"
        found = first_difference(x, y, _class_of(metadata["slots"], x), f"{path}.{n}.")
        if found:
          return found
      continue
    below = field.type if field and dataclasses.is_dataclass(field.type) else None
    if "slot" in metadata:
      below = _class_of(metadata["slot"], a)
    found = first_difference(a, b, below, f"{path}.")
    if found:
      return found
  return None


def _class_of(package: str, value: Mapping[str, Any]) -> type | None:
  """The class of a value, given its JSON; None where it cannot be found any more."""
  try:
    return kind_class(package, value.get("kind", ""))
  except ValueError:
    return None
