"""Every method of the package that starts at SFT, on one short SFT stage: it trains, its result
loads, its programs are those that it trains with.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dpr_jax.config.fields import package_defaults
from dpr_jax.config.run_config import RunConfig
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods import DPR, DemoMethod
from dpr_jax.methods.from_start import FromStart
from dpr_jax.methods.programs import RolloutWork, Shapes, TrainWork
from dpr_jax.methods.sft import sft_programs
from dpr_jax.run import labels_of
from dpr_jax.training.steps import TrainStep

METHODS = package_defaults("dpr_jax.methods")
TRAINED = sorted(name for name, m in METHODS.items()
                 if m.trained and not isinstance(m, FromStart) and not getattr(m, "start", ""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(DemoMethod):
  """All that a new method declares."""

  def loss(self, model):
    return make_sft_loss(model)


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done, and whose methods make two small steps."""

  def change(config):
    config.sft.steps, config.sft.milestones = 4, (0.5,)
    config.budget.steps, config.budget.batch_size, config.budget.accumulation = 2, 8, 2
    config.budget.optimizer.warmup_steps = 0
    config.compare = tuple(TRAINED)

  return train_sft(change)


@pytest.fixture
def seen(monkeypatch):
  """Shapes and dtypes of what every train step was called with."""
  plain, calls = TrainStep.__call__, []

  def call(self, state, batch):
    inner, fixed = self._split(state)
    calls.append(_shapes((inner, fixed, batch)))
    return plain(self, state, batch)

  monkeypatch.setattr(TrainStep, "__call__", call)
  return calls


def _shapes(tree):
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _flat(variables):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(variables)])


@pytest.mark.parametrize("name", [*TRAINED, "mine"])
def test_a_method_trains_and_its_programs_are_those_it_trains_with(
    trained, seen, name, with_config, monkeypatch
):
  method, made = METHODS.get(name, Mine()), []
  run = with_config(trained, **{name: method}, compare=(name,))
  build = type(method).build

  def keep(*args):
    made.append(build(*args))
    return made[-1]

  monkeypatch.setattr(type(method), "build", keep)
  method.train(run, name)
  (training,) = made
  # One program of each part of a step, as all prompts have one width.
  if isinstance(method, DPR):
    assert training.step.compilations() == 2
  lines = run.metrics(name)
  assert [line["step"] for line in lines] == [1, 2]
  assert all(np.isfinite(line["loss"]) and line["tokens"] > 0 for line in lines)
  result = run.result(name)
  assert 0 < np.abs(_flat(result) - _flat(run.sft())).max() < 0.1  # It starts at SFT.
  monkeypatch.setattr(type(method), "build", None)
  method.train(run, name)  # Finished: nothing is made again.
  (member,) = method.system(run, name).load()
  np.testing.assert_array_equal(_flat(member), _flat(result))

  programs = method.programs(Shapes(run.config, run.model, run.mesh, run.stop_ids), name)
  assert [p.name.partition("/")[0] for p in programs] == [name] * len(programs)
  assert all(p.work.rows > 0 and p.resident_bytes >= 0 for p in programs)
  lowered = programs[-1].lower()
  assert seen == [_shapes(lowered.args_info[0])] * 2
  assert isinstance(programs[-1].work, TrainWork) and programs[-1].tokens > 0
  sampling = [p for p in programs if isinstance(p.work, RolloutWork)]
  for program in sampling:
    assert program.lower().as_text() and program.tokens == 0
  assert bool(sampling) == any(hasattr(method, x) for x in ("returns", "divergence")) or (
      name == "spin"
  )


def test_the_program_of_sft_is_the_one_it_trains_with(trained):
  (program,) = sft_programs(Shapes(trained.config, trained.model, trained.mesh, trained.stop_ids))
  _, fixed, batch = program.lower().args_info[0]
  section, data = trained.config.sft, trained.config.data
  assert {x.shape for x in jax.tree.leaves(batch)} == {(section.batch_size, data.row_length)}
  state = program.lower().args_info[0][0]
  assert _shapes(state.trainable) == _shapes(trained.sft_float32())


def test_all_methods_train_on_about_as_many_tokens(trained):
  shapes = Shapes(trained.config, trained.model, trained.mesh, trained.stop_ids)
  last = {name: METHODS[name].programs(shapes, name)[-1] for name in TRAINED}
  assert {p.tokens for p in last.values()} == {8 * 6}
  assert {p.work.rows for p in last.values()} == {8}


def test_a_budget_of_its_own_is_told_and_the_rest_is_shared():
  config = RunConfig()
  assert DPR().budget(config) == config.budget and DPR().own_budget() == ""
  method = DPR(batch_size=32, optimizer=dict(learning_rate=1e-6, b1=0.0))
  assert method.own_budget() == "batch_size 32, learning_rate 1e-06, b1 0.0"
  budget = method.budget(config)
  assert (budget.batch_size, budget.steps) == (32, config.budget.steps)
  assert budget.optimizer == dataclasses.replace(
      config.budget.optimizer, learning_rate=1e-6, b1=0.0
  )
  with pytest.raises(ValueError, match="batch_size=32 is not a multiple of accumulation=3"):
    dataclasses.replace(method, accumulation=3).budget(config)


def test_names_and_labels_are_told_apart():
  labels = labels_of(METHODS).values()
  assert len(set(labels)) == len(METHODS) and all(labels)
  found = labels_of({"a": Mine(), "b": Mine(), "c": Mine(label="C"), "dpr": DPR()})
  assert found == {"a": "Mine (a)", "b": "Mine (b)", "c": "C", "dpr": "DPR"}
