"""A config that cannot be run is refused with the name of the field; a valid one round-trips."""

import dataclasses
import functools
import json
import pathlib

import pytest

from dpr_jax import config as config_lib
from dpr_jax.config.fields import kind_of, kinds
from dpr_jax.config.sections import EvalSection
from dpr_jax.config.values import hints, optional
from dpr_jax.errors import UserError
from dpr_jax.main import parse
from dpr_jax.run import labels_of

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")
    if "def get_config" in path.read_text()
)


@functools.cache
def _defaults():
  return json.dumps(config_lib.to_json(config_lib.RunConfig()))


def _refused(*changes):
  """The message with which the default config with (path, value) changes is refused."""
  values = json.loads(_defaults())
  for path, value in changes:
    section = values
    *parents, name = path.split(".")
    for parent in parents:
      if section.get(parent) is None:
        section[parent] = {}
      section = section[parent]
    section[name] = json.loads(json.dumps(value))
  with pytest.raises(UserError) as caught:
    config_lib.resolve(values)
  assert "\n" not in str(caught.value)
  return str(caught.value)


# --- Every field, as its dataclass declares it ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
  """A dataclass somewhere in a run's config."""

  cls: type
  path: str  # "" at the top, else with a dot at the end.
  kinds: tuple[tuple[str, dict], ...] = ()  # values that must be put in place to reach it.


def _parts(part):
  yield part
  types = hints(part.cls)
  for field in dataclasses.fields(part.cls):
    path, kind = f"{part.path}{field.name}", optional(types[field.name])[0]
    package = field.metadata.get("slot") or field.metadata.get("slots")
    if package:
      at = f"{path}.x" if "slots" in field.metadata else path
      for cls in kinds(package).values():
        yield from _parts(Part(cls, f"{at}.", (*part.kinds, (at, {"kind": kind_of(cls)}))))
    elif dataclasses.is_dataclass(kind):
      yield from _parts(Part(kind, f"{path}.", part.kinds))


PARTS = list(_parts(Part(config_lib.RunConfig, "")))


def _name(part):
  kinds = "+".join(value["kind"] for _, value in part.kinds)
  return f"{part.path.rstrip('.') or 'top'}{f'[{kinds}]' if kinds else ''}"


def _outside(field, kind):
  """Values just outside of the bounds of a field."""
  get, step = field.metadata.get, 1 if kind is int else 1e-3
  if get("low") is not None:
    yield kind(get("low") - step)
  if get("high") is not None:
    yield kind(get("high") + step)
  for name in ("above", "below"):
    if get(name) is not None:
      yield kind(get(name))


WRONG = {
    int: (1.5, "1", True, [3]), float: ("1e-3", True, [1.0], float("nan"), float("inf")),
    bool: (1, "True"), str: (3, ["a"], True),
}


@pytest.mark.parametrize("part", PARTS, ids=_name)
def test_every_field_takes_its_type_its_bounds_and_its_choices(part):
  types = hints(part.cls)
  for field in dataclasses.fields(part.cls):
    kind, may_be_none = optional(types[field.name])
    if {"slot", "slots"} & set(field.metadata) or dataclasses.is_dataclass(kind):
      continue
    path = f"{part.path}{field.name}"
    if path == "sweep.values":  # Numbers are read as they would stand on the command line.
      continue
    many = not isinstance(kind, type) or kind is tuple
    element = kind.__args__[0] if many else kind
    wrap = (lambda x: [x]) if many else (lambda x: x)
    named = f"config.{path}" + ("[0]" if many else "")
    for value in WRONG.get(element, ()):
      if not (many and isinstance(value, list)):
        assert _refused(*part.kinds, (path, wrap(value))).startswith(f"{named}="), value
    for value in [3, "a"] if many else []:
      message = _refused(*part.kinds, (path, value))
      assert message.startswith(f"config.{path}=") and "must be a list" in message
    if not may_be_none:
      assert _refused(*part.kinds, (path, None)).startswith(f"config.{path}=None")
    for value in _outside(field, element):
      message = _refused(*part.kinds, (path, wrap(value)))
      assert message.startswith(f"config.{path}=") and "out of range" in message, message
    choices = field.metadata.get("choices") or ()
    choices = choices() if callable(choices) else choices
    if choices:
      message = _refused(*part.kinds, (path, wrap("other")))
      assert message.startswith(f"config.{path}='other' is not one of")
      assert all(known in message for known in choices)


def test_the_walk_meets_what_can_be_configured():
  reached = {part.cls for part in PARTS}
  assert {cls for package in ("methods", "references", "rewards") for cls in kinds(
      f"dpr_jax.{package}").values()} <= reached
  bounded = [
      f for part in PARTS for f in dataclasses.fields(part.cls)
      if any(f.metadata.get(b) is not None for b in ("low", "high", "above", "below"))
  ]
  assert len(bounded) > 100


@pytest.mark.parametrize("part", PARTS, ids=_name)
def test_every_default_lies_in_its_bounds_and_the_bounds_themselves_are_allowed(part):
  from dpr_jax.config.values import check_bounds

  for field in dataclasses.fields(part.cls):
    allowed = [field.metadata.get(name) for name in ("low", "high")]
    if field.default is not dataclasses.MISSING:
      allowed.append(field.default)
    for value in allowed:
      if value is not None:
        check_bounds(field, value, "here")


@pytest.mark.parametrize("path,value", [
    ("sft", 3), ("sft.optimizer", "adam"), ("methods", 3), ("methods.dpr", 3), ("reference", 3),
    ("methods.dpr.reward", "endogenous"), ("reference", {"fraction": 0.5}),
    ("methods.dpr", None), ("reference", {"kind": 3}),
])
def test_a_section_is_no_scalar(path, value):
  assert _refused((path, value)).startswith(f"config.{path}")


def test_a_typo_fails_when_it_is_made_and_when_it_is_read():
  config = config_lib.default_config()
  config.lock()
  with pytest.raises(AttributeError, match="stepz"):
    config.sft.stepz = 3
  for path in ("stepz", "sft.stepz", "sft.optimizer.stepz", "model.shape.stepz",
               "methods.dpr.stepz", "methods.dpr.reward.stepz", "reference.stepz"):
    assert f"config.{path} is not a field" in _refused((path, 3))


@pytest.mark.parametrize("path,value", [
    ("num_heads", 3), ("num_kv_heads", 0), ("hidden_size", 0), ("activation", "relu"),
    ("layer_pattern", ["sideways"]),
])
def test_a_model_that_cannot_be_is_refused_by_section_and_field(path, value):
  message = _refused((f"model.shape.{path}", value))
  assert message.startswith("config.model.shape") and path in message


# --- Fields together -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes,named", [
    ({"budget.batch_size": 9, "methods.dpr.samples_per_prompt": 2},
     ["config.methods.dpr", "batch_size=9", "samples_per_prompt=2"]),
    ({"sft.batch_size": 9, "sft.accumulation": 2},
     ["config.sft", "batch_size=9", "accumulation=2"]),
    ({"budget.batch_size": 9, "budget.accumulation": 2},
     ["config.budget", "batch_size=9", "accumulation=2"]),
    ({"methods.continued_sft.batch_size": 9, "budget.accumulation": 2},
     ["config.methods.continued_sft", "batch_size=9", "accumulation=2"]),
    ({"methods.dpr.variance_baseline": "leave_one_out"},
     ["config.methods.dpr", "variance_baseline=leave_one_out", "samples_per_prompt"]),
    ({"methods.dpr.returns": "per_token", "methods.dpr.reward.kind": "endogenous"},
     ["config.methods.dpr", "reward=endogenous", "returns=reward_to_go"]),
    ({"methods.dpr.returns": "per_token", "methods.dpr.gamma": 0.9},
     ["config.methods.dpr", "gamma=0.9", "returns=per_token"]),
    ({"methods.dpr.transforms": ("center",), "methods.dpr.reward.kind": "endogenous"},
     ["config.methods.dpr", "transforms", "center", "reward"]),
    ({"methods.dpr.target_kl": 1.0, "methods.dpr.beta": 0.0, "compare": ("dpr",)},
     ["config.methods.dpr", "target_kl=1.0", "beta"]),
    ({"methods.dpr.beta": 0.0},
     ["config.methods.contrastive", "optimum_of='dpr'", "above 0; set strength"]),
    ({"methods.contrastive.optimum_of": "spin"},
     ["config.methods.contrastive", "optimum_of='spin'", "set strength"]),
    ({"eval.num_prompts": 200, "eval.skip_prompts": 100},
     ["eval.num_prompts=200", "eval.skip_prompts=100", "data.holdout=256"]),
    ({"eval.num_prompts": 0, "eval.skip_prompts": 256}, ["eval.skip_prompts=256"]),
    ({"methods.dpr.transforms": ("clip:2", "log")},
     ["config.methods.dpr", "transforms[1]='log'"]),
    ({"data.demos": "a.jsonl", "eval.num_prompts": 8, "data.corrupt": 0.5},
     ["config.data.corrupt", "config.data.demos=a.jsonl"]),
    *[({"data.demos": "a.jsonl", "eval.num_prompts": 8, field: value},
       [f"{field} applies to the built-in tasks only", "config.data.demos=a.jsonl"])
      for field, value in (("data.corruption", "token"), ("data.minority", 0.1))],
    ({"data.corrupt": 0.6, "data.minority": 0.5},
     ["config.data: corrupt=0.6 and minority=0.5", "must not exceed 1 together"]),
    ({"sft.steps": 4}, ["config.sft: milestones: 0.1 of 4 steps is step 0"]),
    ({"sft.milestones": (0.5, 1.5)}, ["config.sft: milestones: 1.5 of 600 steps"]),
    ({"model.keep_layers": 2}, ["config.model.keep_layers=2", "config.model.pretrained"]),
    ({"log.profile_steps": "3"}, ["config.log", "'3' must be FIRST:LAST"]),
    ({"eval.temperatures": ()}, ["config.eval", "temperatures=()", "frontier_samples=8"]),
    ({"eval.temperatures": (0.5, 1.0, 0.5)}, ["config.eval", "temperatures=(0.5, 1.0, 0.5)"]),
])
def test_fields_that_contradict_each_other_are_both_named(changes, named):
  config = config_lib.default_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError) as caught:
    config_lib.resolve(config)
  assert all(name in str(caught.value) for name in named), str(caught.value)


@pytest.mark.parametrize("fields,named", [
    ({"kind": "ensemble", "fractions": [0.5, 0.5]}, ["fractions=(0.5, 0.5)", "at least two"]),
    ({"kind": "ensemble", "fractions": [0.5, 0.3]}, ["fractions[1]=0.3", "milestones"]),
    ({"kind": "midrun", "fraction": 0.3}, ["fraction=0.3", "milestones"]),
    ({"kind": "half_data", "fraction": 1.0}, ["fraction=1.0", "between 0 and 1"]),
    ({"kind": "half_data", "fraction": 1e-4}, ["fraction=0.0001", "at least one"]),
    ({"kind": "checkpoint"}, ["path is missing"]),
    ({"kind": "early"}, ["kind='early' is not one of", "midrun"]),
    (None, ["config.reference=None is not a value of dpr_jax.references"]),
])
def test_a_reference_that_cannot_be_is_refused(fields, named):
  message = _refused(("reference", fields))
  assert message.startswith("config.reference") and all(name in message for name in named), message


def test_a_reference_is_selected_among_several_and_measured():
  selected = ("reference", {"kind": "selected", "criterion": "validation"})
  assert "eval.reference_prompts" in _refused(selected, ("eval.reference_prompts", 0))
  assert "at least two sft.milestones" in _refused(selected, ("sft.milestones", [0.5]))


def test_lists_become_tuples_and_whole_numbers_floats():
  values = config_lib.default_config().to_dict()
  values["sft"]["milestones"] = [0.5, 1]
  values["methods"]["dpr"]["beta"] = 2
  values["data"]["tasks"] = ("add,sort",)
  run = config_lib.resolve(values)
  assert run.sft.milestones == (0.5, 1.0) and run.data.tasks == ("add", "sort")
  beta = run.methods["dpr"].beta
  assert isinstance(beta, float) and beta == 2.0
  hash(run.methods["dpr"]), hash(run.sft), hash(run.reference)


# --- What is compared ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes,named", [
    ([("compare", ["dpr", "drp"])], ["config.compare: 'drp' is not one of", "continued_sft, "]),
    ([("compare", ["dpr", "spin", "dpr"])], ["config.compare: 'dpr'", "twice"]),
    *[([(f"methods.{name}", {"kind": "dpr"})], [f"config.methods.{name}", "another name"])
      for name in ("base", "ref", "sft")],
    ([("methods.dpr.reward", None)], ["config.methods.dpr.reward=None is not a value of"]),
    ([("methods.mine", {"kind": "drp"})], ["config.methods.mine.kind='drp' is not one of", "dpr"]),
])
def test_what_cannot_be_compared_is_refused(changes, named):
  message = _refused(*changes)
  assert all(part in message for part in named), message


def test_what_is_not_compared_is_no_part_of_the_run():
  config = config_lib.default_config()
  config.compare = ("spin", "contrastive")
  config.methods.gsil.alpha = 0.3
  run = config_lib.resolve(config)
  assert list(run.compared()) == ["spin", "contrastive"]
  assert set(run.methods) == {"spin", "contrastive", "dpr"}  # Whose strength is read.
  config.methods.contrastive.strength = 0.5
  assert set(config_lib.resolve(config).methods) == {"spin", "contrastive"}


def test_two_methods_of_a_kind_have_budgets_of_their_own():
  from dpr_jax.methods import DPR

  config = config_lib.default_config()
  config.methods.slow = DPR(steps=7, optimizer=dict(learning_rate=1e-5, schedule="constant"))
  config.methods.fast = DPR(label="Fast", batch_size=32)
  config.methods.fast.optimizer.b1 = 0.5  # As --config.methods.fast.optimizer.b1=0.5 does.
  config.compare = ("slow", "fast")
  run = config_lib.resolve(config)
  slow, fast = (method.budget(run) for method in run.compared().values())
  shared = run.budget
  assert slow == dataclasses.replace(
      shared, steps=7,
      optimizer=dataclasses.replace(shared.optimizer, learning_rate=1e-5, schedule="constant"),
  )
  assert fast == dataclasses.replace(
      shared, batch_size=32, optimizer=dataclasses.replace(shared.optimizer, b1=0.5)
  )
  assert run.methods["slow"].own_budget() == "steps 7, learning_rate 1e-05, schedule constant"
  assert labels_of(run.compared()) == {"slow": "DPR", "fast": "Fast"}


# --- To JSON and back ----------------------------------------------------------------------------


def test_the_default_resolves_and_survives_json():
  run, default = config_lib.resolve(config_lib.default_config()), config_lib.RunConfig()
  # Only what is compared stays of the methods.
  assert dataclasses.replace(run, methods=default.methods) == default
  assert run.methods == {name: default.methods[name] for name in default.compare}
  assert config_lib.resolve(json.loads(json.dumps(config_lib.to_json(run)))) == run


@pytest.mark.parametrize("arg", ["", ":debug"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_survives_json(name, arg, monkeypatch):
  monkeypatch.chdir(ROOT)
  run, *_ = parse([f"--config={name}{arg}", "--workdir=unused"])
  again = config_lib.resolve(json.loads(json.dumps(config_lib.to_json(run))))
  assert again == run and config_lib.first_difference(
      config_lib.to_json(run), config_lib.to_json(again)
  ) is None


def test_the_first_difference_that_matters_is_named():
  old = config_lib.to_json(config_lib.RunConfig())
  new = json.loads(json.dumps(old))
  assert config_lib.first_difference(old, new) is None
  new["log"]["every"], new["mesh"]["tensor"] = 7, 2  # may differ.
  new["model"]["attention"], new["model"]["logits_budget"] = "xla", 1.0
  new["methods"]["dpr"]["slots"], new["methods"]["dpr"]["refill"] = 16, 0.5
  assert config_lib.first_difference(old, new) is None
  new["sft"]["optimizer"]["learning_rate"] = 0.5
  named = "config.sft.optimizer.learning_rate: 0.001 there, 0.5 here"
  assert config_lib.first_difference(old, new) == named


@pytest.mark.parametrize("path,value,named", [
    ("methods.dpr.beta", 2.0, "config.methods.dpr.beta: 1.0 there, 2.0 here"),
    ("methods.spin.optimizer.b1", 0.5, "config.methods.spin.optimizer.b1: None there, 0.5 here"),
    ("methods.dpr.reward.kind", "endogenous",
     "config.methods.dpr.reward.kind: 'baseline_relative' there, 'endogenous' here"),
    ("methods.mine", {"kind": "dpr"}, "config.methods.mine: None there, {'kind': 'dpr'} here"),
    ("reference.fraction", 0.25, "config.reference.fraction: 0.5 there, 0.25 here"),
    ("eval.benchmark", {"kind": "exact"},
     "config.eval.benchmark: None there, {'kind': 'exact'} here"),
    ("eval.metrics.length", None,
     "config.eval.metrics.length: {'kind': 'length'} there, None here"),
    ("compare", ["dpr"], "config.compare: "),
])
def test_a_difference_in_a_value_is_named(path, value, named):
  old = json.loads(_defaults())
  new = json.loads(_defaults())
  section = new
  *parents, name = path.split(".")
  for parent in parents:
    section = section[parent]
  section[name] = value
  assert config_lib.first_difference(old, new).startswith(named)


def test_without_a_frontier_there_need_be_no_temperatures():
  assert EvalSection(frontier_samples=0, temperatures=()).temperatures == ()


@pytest.mark.parametrize("name,benchmark,named", [
    ("accuracy", None, "accuracy is a score of the benchmark already"),
    ("token_f1", {"kind": "exact"}, "token_f1 is a score of the benchmark already"),
    ("length_sampled", None, "length_sampled is a column of config.eval.metrics.length already"),
    ("heldout_nll_2", None, "heldout_nll is a column of config.eval.metrics.heldout_nll already"),
    ("a/b", None, "'a/b' must be without '/'"),
])
def test_two_columns_of_one_name_are_refused(name, benchmark, named):
  kind = "heldout_nll" if name == "heldout_nll_2" else "length"
  values = config_lib.to_json(config_lib.RunConfig())
  values["eval"]["metrics"][name] = {"kind": kind}
  values["eval"]["benchmark"] = benchmark
  with pytest.raises(UserError, match=f"^config.eval.metrics.{name}: .*{named}"):
    config_lib.resolve(values)
