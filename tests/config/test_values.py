"""Values in a config: assigned, named on the command line, of the project or of a user."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from dpr_jax import config as config_lib
from dpr_jax import methods, references, rewards
from dpr_jax.config.fields import kind_of
from dpr_jax.config.files import load_config
from dpr_jax.config.sections import Budget
from dpr_jax.errors import UserError
from dpr_jax.evaluation.metrics import Length
from dpr_jax.main import parse
from dpr_jax.methods.gsil import GSIL
from dpr_jax.methods.spin import SPIN
from dpr_jax.references.ema import EMA
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.run import describe
from dpr_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = [f"--config={ROOT}/configs/smoke.py", "--workdir=unused"]


# --- Assigned ------------------------------------------------------------------------------------


def test_a_dataclass_becomes_the_section_of_its_fields():
  config = config_lib.default_config()
  config.budget = Budget(steps=3)
  config.sft.optimizer = config_lib.OptimizerConfig(learning_rate=0.5)
  config.reference = EMA(decay=0.5)
  config.methods.dpr = methods.DPR(reward=rewards.LogLikelihood(), beta=2.0)
  config.methods["mine"] = SPIN(beta=0.3)
  # Fields below what was assigned can be set as before.
  config.budget.batch_size, config.methods.dpr.gamma = 128, 1.0
  config.methods.mine.steps = 5
  config.compare = ("mine", "dpr")
  run = config_lib.resolve(config)
  assert run.budget == Budget(steps=3, batch_size=128)
  assert run.sft.optimizer.learning_rate == 0.5 and run.reference == EMA(decay=0.5)
  assert run.methods == {
      "mine": SPIN(beta=0.3, steps=5),
      "dpr": methods.DPR(reward=rewards.LogLikelihood(), beta=2.0),
  }


def test_a_locked_config_takes_values_for_what_it_has():
  config = config_lib.default_config().lock()
  config.reference = Ensemble(fractions=(0.1, 0.75))
  config.methods.spin = GSIL(alpha=0.3)
  config.compare = ("spin",)
  run = config_lib.resolve(config)
  assert run.reference == Ensemble(fractions=(0.1, 0.75)) and run.methods["spin"] == GSIL(alpha=0.3)
  with pytest.raises(AttributeError, match="referense"):
    config.referense = EMA()
  with pytest.raises((AttributeError, KeyError), match="mine"):
    config.methods["mine"] = SPIN()
  assert "referense" not in config and "mine" not in config.methods


def test_a_value_of_another_package_is_refused():
  for path, value in (("reference", SPIN()), ("methods.mine", EMA()), ("eval.benchmark", EMA())):
    config = config_lib.default_config()
    *parents, name = path.split(".")
    section = config
    for parent in parents:
      section = section[parent]
    section[name] = value
    with pytest.raises(UserError, match=rf"^config\.{path}\.kind='{kind_of(value)}' is not one of"):
      config_lib.resolve(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picky(rewards.LogLikelihood):
  """A reward that goes together with nothing."""

  def check(self, config):
    raise ValueError(f"seed={config.seed} is not to its taste")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickyMetric(Length):
  def check(self, config):
    raise ValueError("never")


def test_every_value_of_what_is_compared_is_checked():
  config = config_lib.default_config()
  config.methods.mine = methods.DPR(reward=Picky())
  config_lib.resolve(config)  # It is not compared.
  config.compare = ("mine",)
  with pytest.raises(UserError, match=r"^config\.methods\.mine\.reward: seed=0 is not to its"):
    config_lib.resolve(config)
  config.compare = ("dpr",)
  config.eval.metrics.mine = PickyMetric()
  with pytest.raises(UserError, match=r"^config\.eval\.metrics\.mine: never$"):
    config_lib.resolve(config)


class Plain(rewards.base.Reward):
  """A reward that is no dataclass."""

  def __call__(self, sft_logp):
    return sft_logp


def plain_function(sft_logp):
  return sft_logp


@pytest.mark.parametrize("value,name", [
    (plain_function, "plain_function"), (Plain(), "Plain"),
    (rewards.LogLikelihood, "LogLikelihood"),
])
def test_what_is_no_instance_of_a_dataclass_is_refused_with_its_field(value, name):
  message = rf"{name} must be an instance of a frozen dataclass derived from Reward$"
  config = config_lib.default_config().lock()
  config.methods.dpr.reward = value
  with pytest.raises(UserError, match=rf"^config\.methods\.dpr\.reward={message}"):
    config_lib.resolve(config)
  config.methods.dpr = methods.DPR(reward=value)
  with pytest.raises(UserError, match=rf"^config\.methods\.dpr\.reward={message}"):
    config_lib.resolve(config)


def test_an_optimizer_with_an_unknown_field_is_refused_by_name():
  with pytest.raises(ValueError, match=r"^optimizer\.learning_rat is not a field; known: b1"):
    methods.DPR(optimizer=dict(learning_rat=1))


# --- On the command line -------------------------------------------------------------------------


def test_a_kind_is_put_in_place_before_its_fields_are_set():
  run, *_ = parse([
      *SMOKE, "--config.reference.decay=0.75", "--config.reference.kind=ema",
      "--config.methods.other.kind=spin", "--config.methods.other.beta=0.5",
      "--config.methods.spin.kind=gsil", "--config.methods.spin.alpha=0.3",
      "--config.methods.dpr.reward.kind=endogenous", "--config.methods.dpr.returns=reward_to_go",
      "--config.eval.benchmark.kind=tasks", "--config.compare=other,spin,dpr",
  ])
  assert run.reference == EMA(decay=0.75)
  assert run.methods == {
      "other": SPIN(beta=0.5),
      "spin": GSIL(alpha=0.3),
      "dpr": methods.DPR(reward=rewards.Endogenous(), returns="reward_to_go"),
  }
  assert kind_of(run.eval.benchmark) == "tasks" and run.compare == ("other", "spin", "dpr")


@pytest.mark.parametrize("flags,named", [
    (["reference.kind=emma"], ["--config.reference.kind='emma' is not one of", "ema, ensemble"]),
    (["reference.kind=dpr"], ["--config.reference.kind='dpr' is not one of"]),
    (["reference.kind"], ["--config.reference.kind='' is not one of"]),
    (["reference.kind=nowhere:X"], ["--config.reference.kind='nowhere:X' cannot be imported"]),
    (["reference.kind=dpr_jax.methods.spin:SPIN"], ["is not a subclass of ReferenceKind"]),
    (["methods.mine.kind=json:JSONDecoder"], ["is not a subclass of Method"]),
    (["methods.mine.kind=dpr_jax.methods.spin:NOTHING"], ["cannot be imported", "NOTHING"]),
    (["sft.kind=ema"], ["--config.sft.kind: config.sft is not a value of some kind"]),
    (["methods.kind=ema"], ["config.methods is not a value"]),
    (["methods.dpr.beta.kind=ema"], ["config.methods.dpr.beta is not a value"]),
    (["methods.spin.reward.kind=endogenous"], ["config.methods.spin.reward is not a value"]),
    (["methods.mine.reward.kind=endogenous"], ["config.methods.mine.reward is not a value"]),
    (["methods.dpr.reward.kind=endogenous"], ["config.methods.dpr: reward=endogenous"]),
    (["reference.kind=ema", "reference.fraction=0.5"],
     ["--config.reference.fraction: 'fraction' is not a field", "decay"]),
    (["methods.mine.beta=2"], ["--config.methods.mine.beta: 'mine' is not a field"]),
])
def test_a_kind_that_cannot_be_is_refused_in_one_line(flags, named):
  with pytest.raises(UserError) as caught:
    parse([*SMOKE, *(f"--config.{flag}" for flag in flags)])
  assert "\n" not in str(caught.value)
  assert all(part in str(caught.value) for part in named), str(caught.value)


@pytest.mark.parametrize("given,expected", [
    ("clip:2,scale:0.5", ("clip:2", "scale:0.5")), ("clip:-1:2", ("clip:-1:2",)),
    ("zscore", ("zscore",)), ("('clip:2', 'zscore')", ("clip:2", "zscore")), ("()", ()),
])
def test_lists_are_set_on_the_command_line(given, expected):
  run, *_ = parse([
      *SMOKE, f"--config.methods.dpr.transforms={given}",
      "--config.reference.kind=ensemble", "--config.reference.fractions=0.1,0.75",
  ])
  assert run.methods["dpr"].transforms == expected and run.reference.fractions == (0.1, 0.75)


@pytest.mark.parametrize("given,expected", [
    ("sort,upper:0.02", ("sort", "upper:0.02")), ("upper:.5,sort:.5", ("upper:.5", "sort:.5")),
    ("sort", ("sort",)), ("('sort', 'upper:0.02')", ("sort", "upper:0.02")), ("()", ()),
])
def test_tasks_and_their_shares_are_set_on_the_command_line(given, expected):
  run, *_ = parse([*SMOKE, f"--config.data.tasks={given}"])
  assert run.data.tasks == expected


def test_fields_that_are_none_by_default_are_set_on_the_command_line():
  run, *_ = parse([
      *SMOKE, "--config.methods.dpr.steps=7", "--config.methods.dpr.optimizer.learning_rate=1e-5",
  ])
  method = run.methods["dpr"]
  assert method.own_budget() == "steps 7, learning_rate 1e-05"
  assert method.budget(run).optimizer.b1 == run.budget.optimizer.b1


# --- Of a user -----------------------------------------------------------------------------------

USER = '''
import dataclasses

from dpr_jax.config import setting
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods import DPR, DemoMethod
from dpr_jax.references import Reference, ReferenceKind
from dpr_jax.rewards.base import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halved(DemoMethod):
  """SFT with a scaled loss."""

  title = "Halved SFT"
  factor: float = setting(0.5, "of the loss", above=0, high=1)

  def loss(self, model):
    return make_sft_loss(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowDPR(DPR):
  pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin(Reward):
  least: float = setting(0.0, "of the entropy", low=0)

  def __call__(self, sft_logp, ref_logp, sft_entropy):
    return sft_logp - ref_logp - self.least * sft_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class First(ReferenceKind):
  def __call__(self, run, dtype):
    return Reference((run.initial_variables(dtype),))

  def describe(self):
    return "ref where it began"
'''
CONFIG = '''
from {module} import First, Halved, Margin, SlowDPR

from dpr_jax.config import debug_config, default_config


def get_config(arg=""):
  config = debug_config(default_config())
  config.methods.halved = Halved(factor=0.25, steps=3)
  config.methods.dpr = SlowDPR(reward=Margin(least=0.1))
  config.reference = First()
  config.compare = ("halved", "dpr")
  return config
'''


@pytest.fixture
def user(tmp_path, monkeypatch):
  """(path of a user's config, name of the module with the user's values beside it)."""
  module = f"user_{tmp_path.name}".replace("-", "_")  # Modules are imported once per process.
  (tmp_path / f"{module}.py").write_text(USER)
  (tmp_path / "mine.py").write_text(CONFIG.format(module=module))
  monkeypatch.setattr(sys, "path", list(sys.path))
  yield tmp_path / "mine.py", module
  sys.modules.pop(module, None)


def test_a_users_values_round_trip_and_are_described(user):
  path, module = user
  run = config_lib.resolve(load_config(str(path)))
  record = json.loads(json.dumps(config_lib.to_json(run)))
  assert record["methods"]["halved"]["kind"] == f"{module}:Halved"
  assert record["methods"]["dpr"]["reward"] == {"kind": f"{module}:Margin", "least": 0.1}
  assert config_lib.resolve(record) == run and run.methods["halved"].factor == 0.25
  found = describe(run)
  assert found["reference"] == "ref where it began"
  assert found["labels"] == {"halved": "Halved SFT", "dpr": "DPR"}
  assert found["subjects"] == ["dpr"] and found["own_budget"] == {"halved": "steps 3"}


def test_a_users_bounds_hold(user):
  path, module = user
  for flag, named in (
      ("methods.halved.factor=2.0", "config.methods.halved.factor=2.0 is out of range"),
      ("methods.dpr.reward.least=-1.0", "config.methods.dpr.reward.least=-1.0 is out of range"),
      ("methods.dpr.transforms=center,clip:2", "config.methods.dpr: transforms: center"),
      ("methods.halved.factr=0.5", "'factr' is not a field; did you mean 'factor'"),
      (f"methods.halved.kind={module}:Margin", "is not a subclass of Method"),
      ("methods.spin.beta=0.5", "--config.methods.spin.beta: 'spin' takes no part in the run"),
  ):
    with pytest.raises(UserError) as caught:
      parse([f"--config={path}", "--workdir=unused", f"--config.{flag}"])
    assert named in str(caught.value)


def test_a_users_run_goes_on_with_the_same_config_alone(user, tmp_path):
  path, _ = user
  config = load_config(str(path))
  workdir = Workdir(tmp_path / "run")
  workdir.path.mkdir()
  record = {"config": config_lib.to_json(config_lib.resolve(config))}
  workdir.config_file.write_text(json.dumps(record))
  workdir.check(config_lib.resolve(load_config(str(path))))
  config.methods.dpr.slots = 8  # Of DPR, from which the user's class is made: may differ.
  workdir.check(config_lib.resolve(config))
  config.methods.halved.factor = 0.5
  with pytest.raises(UserError, match=r"config\.methods\.halved\.factor: 0\.25 there, 0\.5 here"):
    workdir.check(config_lib.resolve(config))


def test_values_can_be_declared_in_the_config_itself(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(USER + CONFIG.split("\n\n", 1)[1])
  run = config_lib.resolve(load_config(str(path)))
  assert config_lib.resolve(config_lib.to_json(run)) == run
  assert kind_of(run.methods["halved"]) == "config_own:Halved"


def test_a_users_module_is_found_by_a_process_of_its_own(user):
  """What the command line does; nothing of the project was imported before."""
  code = (
      "import sys; from dpr_jax.main import parse; run, *_ = parse(sys.argv[1:]); "
      "print(run.methods['halved'].factor)"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, f"--config={user[0]}", "--workdir=unused",
       "--config.methods.halved.factor=0.125"],
      cwd=ROOT, text=True, capture_output=True, check=True,
  )
  assert done.stdout.strip() == "0.125"


def test_every_value_of_the_project_has_a_kind():
  """So that config files stay valid where classes move."""
  for package in ("methods", "references", "rewards", "evaluation.metrics",
                  "evaluation.benchmarks"):
    from dpr_jax.config.fields import kinds, package_defaults

    known = kinds(f"dpr_jax.{package}")
    assert known and all(dataclasses.is_dataclass(cls) for cls in known.values())
    assert len(set(known)) == len(known)
    for value in package_defaults(f"dpr_jax.{package}").values():
      assert known[kind_of(value)] is type(value)
  assert issubclass(references.ReferenceKind, config_lib.Value)
