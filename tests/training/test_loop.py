"""A resumed stage is the uninterrupted one, bit for bit; a diverged one saves nothing bad."""

import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from dpr_jax import sharding, signals
from dpr_jax.config.sections import CheckpointSection, LogSection, OptimizerConfig
from dpr_jax.errors import Diverged, Stopped, UserError
from dpr_jax.training import make_train_step
from dpr_jax.training.checkpoints import Checkpoints, DamagedCheckpoint, make_way
from dpr_jax.training.loop import Stage, Training, run_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.optimizer import make_optimizer

OPTIMIZER = optax.adam(0.1)


class Killed(Exception):
  """Stands for a process that ends in the middle of a stage."""


class SeededBatches:
  """Batch t is a pure function of (seed, t); `kill_at` raises instead of giving that batch."""

  def __init__(self, make, kill_at=None, poison_at=None):
    self.make, self.next_step, self.kill_at, self.poison_at = make, 0, kill_at, poison_at

  def __iter__(self):
    return self

  def __next__(self):
    t = self.next_step
    if t == self.kill_at:
      raise Killed
    rows = self.make(np.random.default_rng([7, t]))
    if t == self.poison_at:
      rows = rows.replace(y=np.full_like(rows.y, np.nan), weight=np.ones_like(rows.y))
    self.next_step = t + 1
    return rows

  def get_state(self):
    return {"next_step": self.next_step}

  def set_state(self, state):
    self.next_step = state["next_step"]


@pytest.fixture
def make_training(loss_fn, make_rows, make_state, describe):
  """make_training(kill_at, poison_at, optimizer, schedule) -> Training of the linear model."""

  def make(kill_at=None, poison_at=None, optimizer=OPTIMIZER, schedule=lambda t: 0.1):
    place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    start = lambda: jax.device_put(make_state(seed=2).trainable, place)
    return Training(
        step=make_train_step(loss_fn, optimizer),
        batches=SeededBatches(make_rows, kill_at, poison_at), start=start,
        abstract=describe(start()), rng=jax.random.key(2), schedule=schedule,
    )

  return make


@pytest.fixture
def stage(make_training):
  """stage(directory, ...) runs 11 steps, a checkpoint every 4, milestones at 3 and 6.

  `log` are fields of LogSection, and **changes those of `make_training`; `build` replaces it.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def run(directory, log=None, profile_dir=None, build=None, **changes):
    what = Stage(
        "stage", directory, mesh, 11, keep_steps=(3, 6), checkpoint=CheckpointSection(every=4),
        log=LogSection(progress=False, tensorboard=False, **(log or {})), profile_dir=profile_dir,
    )
    with jax.set_mesh(mesh):
      return run_stage(what, build or (lambda: make_training(**changes)))

  return run


def _bits(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(
      (state.step, state.trainable, state.opt_state, jax.random.key_data(state.rng)))]


def _lines(directory):
  """Metrics without what a clock says."""
  return [{k: v for k, v in line.items() if k != "seconds"}
          for line in read_metrics(directory / "metrics.jsonl")]


def test_an_uninterrupted_stage_writes_one_line_a_step(stage, tmp_path):
  state = stage(tmp_path)
  assert int(state.step) == 11
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(1, 12))
  for line in lines:
    assert {"step", "loss", "tokens", "seconds", "grad_norm", "learning_rate"} <= set(line)
  assert [a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"]
          for a, b in zip(lines, lines[1:])] == [True] * 10
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert kept == [3, 6, 11]


@pytest.mark.parametrize("kills,log_every", [
    ((0,), 1), ((2,), 1), ((5,), 1), ((10,), 3), ((5, 7, 10), 3),
], ids=str)
def test_a_resumed_stage_equals_the_uninterrupted_one(stage, tmp_path, kills, log_every):
  """Whatever the step it was cut at, and with what it had written beyond its last checkpoint."""
  log = {"every": log_every}
  whole = stage(tmp_path / "whole", log=log)
  for t in kills:
    with pytest.raises(Killed):
      stage(tmp_path / "cut", kill_at=t, log=log)
  resumed = stage(tmp_path / "cut", log=log)
  assert _bits(resumed) == _bits(whole)
  lines = _lines(tmp_path / "cut")
  assert lines == _lines(tmp_path / "whole")
  steps = [line["step"] for line in lines]
  assert len(steps) == len(set(steps)) and steps[-1] == 11


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_that_is_reached(
    stage, make_training, read_state, tmp_path, signum
):
  """Steps 2, 7 and 11, the last: none is due for a checkpoint of its own, but the last."""
  whole = stage(tmp_path / "whole")
  for step in (2, 7, 11):

    def build(step=step):
      training = make_training()
      make = training.batches.make

      def batch(rng):
        if training.batches.next_step == step - 1:
          os.kill(os.getpid(), signum)
          os.kill(os.getpid(), signal.SIGTERM)
        return make(rng)

      training.batches.make = batch
      return training

    with pytest.raises(Stopped, match=f"stopped by .*; step {step} is saved") as stopped:
      with signals.handled():
        stage(tmp_path / "cut", build=build)
    assert stopped.value.code == 128 + signum
    with Checkpoints(tmp_path / "cut" / "checkpoints", read_only=True) as checkpoints:
      assert checkpoints.steps()[-1] == step
  read = lambda name: read_state(make_training(), tmp_path / name)
  assert _bits(read("cut")) == _bits(whole) and _lines(tmp_path / "cut") == _lines(
      tmp_path / "whole")


def test_a_finished_stage_is_neither_built_nor_run(stage, make_training, read_state, tmp_path):
  first, lines = stage(tmp_path), _lines(tmp_path)

  def build():
    raise AssertionError("a finished stage was built")

  assert stage(tmp_path, build=build) is None
  assert _bits(read_state(make_training(), tmp_path)) == _bits(first) and _lines(tmp_path) == lines


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_logged_learning_rate_is_the_one_that_was_used(stage, tmp_path, schedule):
  """By the size of Adam's first updates: the rate, where gradients are far above epsilon."""
  config = OptimizerConfig(learning_rate=0.02, schedule=schedule, warmup_steps=3, eps=0.0)
  optimizer = make_optimizer(config, 11)
  with pytest.raises(Killed):
    stage(tmp_path, optimizer=optimizer, schedule=optimizer.schedule, kill_at=5)
  stage(tmp_path, optimizer=optimizer, schedule=optimizer.schedule)  # Also after a resumption.
  rates = [line["learning_rate"] for line in _lines(tmp_path)]
  assert rates == [float(optimizer.schedule(t)) for t in range(11)]
  assert rates[0] == pytest.approx(0.02 / 3, rel=1e-6) and max(rates) == pytest.approx(0.02)
  one = {"params": {"kernel": np.ones(3, np.float32)}}
  state = optimizer.init(one)
  for rate in rates:  # A constant gradient: each update is minus the rate.
    updates, state = optimizer.update(one, state, one)
    np.testing.assert_allclose(updates["params"]["kernel"], -rate, rtol=1e-4)


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(stage, tmp_path, caplog):
  whole = stage(tmp_path / "whole")
  with pytest.raises(Killed):
    stage(tmp_path / "cut", kill_at=10)
  newest = tmp_path / "cut" / "checkpoints" / "8" / "variables"
  files = [p for p in newest.rglob("*") if p.is_file() and p.parent.name == "d"]
  for path in files:  # arrays this small lie in several of them.
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert files
  with caplog.at_level(logging.WARNING):
    resumed = stage(tmp_path / "cut")
  assert any("step 8 is damaged" in r.getMessage() for r in caplog.records)
  assert _bits(resumed) == _bits(whole) and _lines(tmp_path / "cut") == _lines(tmp_path / "whole")


def test_a_damaged_last_checkpoint_is_named_and_made_again_once_it_is_removed(
    stage, make_training, tmp_path
):
  whole, training = stage(tmp_path), make_training()
  folder = tmp_path / "checkpoints" / "11"
  for path in (folder / "variables").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert stage(tmp_path) is None  # A finished stage is not read.
  with Checkpoints(folder.parent, read_only=True) as checkpoints:
    with pytest.raises(UserError, match="step 11 cannot be read, for it is damaged .*dpr_jax.main"):
      checkpoints.restore_variables(11, training.abstract)
  shutil.rmtree(folder)
  assert _bits(stage(tmp_path)) == _bits(whole)


@pytest.mark.parametrize("step,renamed", [
    (11, {"11.damaged"}), (6, {"6.damaged", "11.replaced"}),
])
def test_a_finished_stage_makes_a_damaged_checkpoint_again(
    stage, make_training, tmp_path, step, renamed
):
  whole, training = stage(tmp_path), make_training()
  lines, folder = _lines(tmp_path), tmp_path / "checkpoints"
  (file,) = [p for p in (folder / str(step) / "variables").glob("manifest.*")]
  file.write_bytes(b"")
  with Checkpoints(folder, read_only=True) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=f"step {step} cannot be read") as caught:
      checkpoints.restore_variables(step, training.abstract)
  make_way(caught.value)
  assert {p.name for p in folder.iterdir() if not p.name.isdigit()} == renamed
  assert _bits(stage(tmp_path)) == _bits(whole) and _lines(tmp_path) == lines
  with Checkpoints(folder, read_only=True) as checkpoints:
    assert checkpoints.steps() == [3, 6, 11]


def test_without_an_earlier_checkpoint_the_command_is_named(stage, make_training, tmp_path):
  stage(tmp_path)
  folder = tmp_path / "checkpoints"
  (folder / "3" / "meta" / "metadata").write_text("{}")
  with Checkpoints(folder, read_only=True) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=f"mv {folder} {folder}.damaged") as caught:
      checkpoints.restore_variables(3, make_training().abstract)
  with pytest.raises(DamagedCheckpoint):
    make_way(caught.value)
  assert sorted(int(p.name) for p in folder.iterdir()) == [3, 6, 11]


@pytest.mark.parametrize("at", [1, 4, 8, 11])
def test_a_diverged_stage_raises_and_saves_nothing_of_that_step(stage, tmp_path, at):
  """Also where the bad step is due for a checkpoint (4, 8), or is the last (11)."""
  with pytest.raises(Diverged, match=f"step {at} is not finite"):
    stage(tmp_path, poison_at=at - 1)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert all(step < at for step in kept)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, at))
  # With the batch mended, the stage resumes and ends the same.
  state = stage(tmp_path)
  assert int(state.step) == 11


def test_the_last_batch_before_a_checkpoint_is_not_repeated(stage, tmp_path):
  """The data position saved at step s is that of batch s, however far the loop reads ahead."""
  with pytest.raises(Killed):
    stage(tmp_path, kill_at=4)
  meta = tmp_path / "checkpoints" / "4" / "meta"
  (found,) = [json.loads(p.read_text()) for p in meta.iterdir() if p.is_file()
              and p.read_text().startswith('{"')  and "next_step" in p.read_text()]
  assert found["step"] == 4 and found["data"]["next_step"] == 4


def test_a_profile_changes_nothing(stage, tmp_path):
  plain = stage(tmp_path / "a")
  traced = stage(tmp_path / "b", log={"profile_steps": "3:4"}, profile_dir=tmp_path / "profile")
  assert _bits(traced) == _bits(plain)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_edited_metrics_of_a_stage_that_has_just_finished_are_refused(stage, tmp_path):
  stage(tmp_path)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text().replace('"step": 2, "loss": ', '"step": 2, "loss": 1'))
  with pytest.raises(UserError, match="metrics.jsonl was cut or edited: its lines up to step 11"):
    stage(tmp_path)
