"""A config that cannot be run is refused with the name of the field; a valid one round-trips."""

import dataclasses
import json
import pathlib

import pytest

from dpr_jax import config as config_lib
from dpr_jax.errors import UserError


def _refused(path, value):
  """The message with which config.`path` = value is refused."""
  values = config_lib.default_config().to_dict()
  section = values
  *parents, name = path.split(".")
  for parent in parents:
    section = section[parent]
  section[name] = value
  with pytest.raises(UserError) as caught:
    config_lib.resolve(values)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_the_default_resolves_and_survives_json():
  run = config_lib.resolve(config_lib.default_config())
  assert run == config_lib.RunConfig() or dataclasses.asdict(run) == dataclasses.asdict(
      config_lib.RunConfig()
  )
  assert config_lib.resolve(json.loads(json.dumps(config_lib.to_json(run)))) == run


def test_a_typo_fails_when_it_is_made_and_when_it_is_read():
  config = config_lib.default_config()
  config.lock()
  with pytest.raises(AttributeError, match="stepz"):
    config.sft.stepz = 3
  for path in ("stepz", "sft.stepz", "sft.optimizer.stepz", "model.shape.stepz"):
    assert f"config.{path} is not a field" in _refused(path, 3)


@pytest.mark.parametrize("path,value", [
    ("seed", 1.5), ("seed", "1"), ("sft.steps", True), ("sft.steps", [3]), ("sft.steps", None),
    ("log.progress", 1), ("data.demos", 3), ("dpr.beta", "1e-3"), ("dpr.beta", True),
    ("dpr.beta", [1.0]), ("data.tasks", "add"), ("data.tasks", 3), ("sft.milestones", 0.5),
    ("sft.milestones", ["a"]), ("data.tasks", [1]), ("sft", 3), ("sft.optimizer", "adam"),
    ("sft.optimizer.b1", None), ("model.shape.num_layers", 2.5),
])
def test_a_wrong_type_names_the_field(path, value):
  assert _refused(path, value).startswith(f"config.{path}")


@pytest.mark.parametrize("path,value", [
    ("seeds", 0), ("sft.steps", 0), ("sft.batch_size", -1), ("dpr.steps", -1),
    ("data.corrupt", 1.1), ("data.row_length", 1),
    ("dpr.top_p", 1.5), ("dpr.top_p", 0.0), ("dpr.temperature", -0.1),
    ("dpr.temperature", 0.0), ("dpr.gamma", 1.01), ("dpr.beta", -1.0), ("dpr.beta", float("nan")),
    ("dpr.beta", float("inf")), ("dpr.max_new_tokens", 0), ("sft.optimizer.learning_rate", -1e-3),
    ("sft.optimizer.b2", 1.0), ("dpr.optimizer.warmup_steps", -1), ("checkpoint.every", 0),
    ("log.every", 0), ("mesh.data", -2), ("model.chunk_size", -1), ("dpr.verifier_weight", 1.1),
    ("dpr.target_kl", -1.0), ("dpr.beta_gain", 1.5), ("dpr.kl_budget", -1.0),
    ("reference.ema_decay", 1.0), ("reference.num_prompts", -1),
])
def test_a_value_out_of_range_names_the_field(path, value):
  message = _refused(path, value)
  assert message.startswith(f"config.{path}="), message


@pytest.mark.parametrize("path", sorted(config_lib._CHOICES))
def test_a_choice_names_the_field_and_the_choices(path):
  message = _refused(path, "other")
  assert message.startswith(f"config.{path}='other' is not one of")
  assert all(known in message for known in config_lib._CHOICES[path])


def test_every_bound_and_choice_is_of_a_field():
  run = config_lib.RunConfig()
  for path in (*config_lib._CHOICES, *config_lib._BOUNDS):
    config_lib._get(run, path)


@pytest.mark.parametrize("path,value", [
    ("num_heads", 3), ("num_kv_heads", 0), ("hidden_size", 0), ("activation", "relu"),
    ("layer_pattern", ["sideways"]),
])
def test_a_model_that_cannot_be_is_refused_by_section_and_field(path, value):
  message = _refused(f"model.shape.{path}", value)
  assert message.startswith("config.model.shape") and path in message


@pytest.mark.parametrize("changes,named", [
    ({"dpr.batch_size": 9, "dpr.samples_per_prompt": 2},
     ["dpr.batch_size=9", "dpr.samples_per_prompt=2"]),
    ({"sft.batch_size": 9, "sft.accumulation": 2}, ["sft.batch_size=9", "sft.accumulation=2"]),
    ({"dpr.batch_size": 9, "dpr.accumulation": 2}, ["dpr.batch_size=9", "dpr.accumulation=2"]),
    ({"dpr.baseline": "leave_one_out"}, ["dpr.baseline=leave_one_out", "dpr.samples_per_prompt"]),
    ({"dpr.returns": "per_token", "dpr.reward": "endogenous"},
     ["dpr.reward=endogenous", "dpr.returns=reward_to_go"]),
    ({"dpr.returns": "per_token", "dpr.gamma": 0.9},
     ["dpr.gamma=0.9", "dpr.returns=per_token"]),
    ({"dpr.transforms": ("centre",), "dpr.reward": "endogenous"},
     ["dpr.transforms", "centre", "dpr.reward"]),
    ({"dpr.target_kl": 1.0, "dpr.beta": 0.0, "eval.contrastive_alpha": 1.0},
     ["dpr.target_kl=1.0", "dpr.beta"]),
    ({"reference.kind": "ema", "reference.ema_decay": 0.0}, ["reference.ema_decay=0"]),
    ({"reference.kind": "ensemble_mean_logp", "reference.fractions": (0.5, 0.5)},
     ["reference.fractions=(0.5, 0.5)", "reference.kind=ensemble_mean_logp"]),
    ({"reference.kind": "half_data", "reference.select": "snr"},
     ["reference.select=snr", "reference.kind=midrun"]),
    ({"eval.num_prompts": 200, "eval.skip_prompts": 100},
     ["eval.num_prompts=200", "eval.skip_prompts=100", "data.holdout=256"]),
    ({"eval.num_prompts": 0, "eval.skip_prompts": 256}, ["eval.skip_prompts=256"]),
    ({"reference.select": "validation", "reference.num_prompts": 0},
     ["reference.select=validation", "reference.num_prompts"]),
    ({"dpr.transforms": ("clip:2", "log")}, ["dpr.transforms[1]='log'"]),
])
def test_fields_that_contradict_each_other_are_both_named(changes, named):
  config = config_lib.default_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError) as caught:
    config_lib.resolve(config)
  assert all(name in str(caught.value) for name in named)


def test_lists_become_tuples_and_whole_numbers_floats():
  values = config_lib.default_config().to_dict()
  values["sft"]["milestones"] = [0.5, 1]
  values["dpr"]["beta"] = 2
  values["data"]["tasks"] = ("add,sort",)
  run = config_lib.resolve(values)
  assert run.sft.milestones == (0.5, 1.0) and run.data.tasks == ("add", "sort")
  assert isinstance(run.dpr.beta, float) and run.dpr.beta == 2.0
  hash(run)


def test_the_first_difference_that_matters_is_named():
  old = config_lib.to_json(config_lib.RunConfig())
  new = json.loads(json.dumps(old))
  assert config_lib.first_difference(old, new) is None
  new["log"]["every"], new["mesh"]["tensor"] = 7, 2  # may differ.
  new["model"]["attention"] = "xla"
  assert config_lib.first_difference(old, new) is None
  new["sft"]["optimizer"]["learning_rate"] = 0.5
  named = "config.sft.optimizer.learning_rate: 0.001 there, 0.5 here"
  assert config_lib.first_difference(old, new) == named


@pytest.mark.parametrize("given,expected", [
    ("clip:2,scale:0.5", ("clip:2", "scale:0.5")), ("clip:-1:2", ("clip:-1:2",)),
    ("zscore", ("zscore",)), ("('clip:2', 'zscore')", ("clip:2", "zscore")), ("()", ()),
])
def test_lists_are_set_on_the_command_line(given, expected, monkeypatch):
  from dpr_jax.main import parse

  monkeypatch.chdir(pathlib.Path(__file__).parents[1])
  run, *_ = parse([
      "--config=configs/smoke.py", "--workdir=unused", f"--config.dpr.transforms={given}",
      "--config.reference.kind=ensemble_mean_logp", "--config.reference.fractions=0.1,0.75",
  ])
  assert run.dpr.transforms == expected and run.reference.fractions == (0.1, 0.75)
