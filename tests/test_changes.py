"""Another optimizer for a run that goes on: what is accepted, what is refused, what is recorded."""

import pytest

from dpr_jax.changes import record_changes
from dpr_jax.config import debug_config, default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.workdir import Workdir


def make_config(**fields):
  config = debug_config(default_config())
  config.compare = ("continued_sft", "dpr")
  for path, value in fields.items():
    *sections, name = path.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[name] = value
  return resolve(config)


@pytest.fixture
def begun(tmp_path):
  """A workdir of a run whose SFT is finished, and whose continued_sft is at step 3 of 4."""
  workdir = Workdir(tmp_path / "run")
  workdir.claim(make_config(), data={"blake2b": "ab"})
  for stage, step in (("sft", 20), ("continued_sft", 3)):
    (workdir.stage(stage) / "checkpoints" / str(step)).mkdir(parents=True)
  return workdir


def test_what_has_changed_is_recorded_and_the_run_is_the_same_then(begun):
  first = make_config(budget__optimizer__learning_rate=1e-6)
  with pytest.raises(UserError, match="another config .*--resume_with_changes"):
    begun.check(first)
  record_changes(begun, first)
  begun.check(first)
  begun.claim(first, data={"blake2b": "ab"})  # As a run does then.
  second = make_config(
      budget__optimizer__learning_rate=1e-6, methods__dpr__optimizer__warmup_steps=2,
      methods__dpr__optimizer__max_grad_norm=0.0,  # That of a stage that has not begun.
  )
  record_changes(begun, second)
  record_changes(begun, second)  # Nothing is different any more.
  found = begun.read_config()["changes"]
  assert [change["fields"] for change in found] == [
      {"config.budget.optimizer.learning_rate": [1e-4, 1e-6]},
      {"config.methods.dpr.optimizer.max_grad_norm": [None, 0.0],
       "config.methods.dpr.optimizer.warmup_steps": [None, 2]},
  ]
  assert found[0]["steps"] == {"sft": 20, "continued_sft": 3, "dpr": 0}


@pytest.mark.parametrize("fields,named", [
    ({"sft__optimizer__learning_rate": 0.1}, "sft is finished .*config.sft.optimizer"),
    ({"sft__steps": 30}, "nothing else .config.sft.steps"),
    ({"methods__dpr__beta": 0.5}, "nothing else .config.methods.dpr.beta"),
    ({"budget__optimizer__learning_rate": 0.1, "data__holdout": 40}, "config.data.holdout"),
    ({"budget__optimizer__max_grad_norm": 0.0}, "continued_sft has begun with 1.0"),
    ({"compare": ("dpr",)}, "config.compare"),
], ids=str)
def test_other_changes_are_refused_and_nothing_is_written(begun, fields, named):
  before = begun.config_file.read_bytes()
  with pytest.raises(UserError, match=named):
    record_changes(begun, make_config(**fields))
  assert begun.config_file.read_bytes() == before


def test_a_stage_that_ended_early_is_finished(begun):
  (begun.stage("continued_sft") / "stopped.json").write_text('{"step": 3, "steps": 4}')
  with pytest.raises(UserError, match="continued_sft is finished"):
    record_changes(begun, make_config(budget__optimizer__learning_rate=0.1))
  # A method's own optimizer is none of that stage.
  record_changes(begun, make_config(methods__dpr__optimizer__learning_rate=0.1))


def test_every_seed_that_has_begun_is_changed(tmp_path):
  before, after = (make_config(seeds=2, sft__optimizer__learning_rate=x) for x in (0.1, 0.01))
  root, part = Workdir(tmp_path / "run"), Workdir(tmp_path / "run" / "seed_0")
  root.claim(before)
  part.claim(make_config(sft__optimizer__learning_rate=0.1))
  record_changes(root, after)
  for workdir in (root, part):
    assert workdir.read_config()["changes"][0]["fields"] == {
        "config.sft.optimizer.learning_rate": [0.1, 0.01]}
  assert not (root.path / "seed_1").exists()
