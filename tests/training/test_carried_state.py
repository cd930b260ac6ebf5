"""What a state carries beside the optimizer (an average of its weights, scalars of the algorithm),
and stages that their algorithm ends: bit for bit the same after an interruption.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax import sharding
from dpr_jax.config.sections import CheckpointSection, LogSection
from dpr_jax.errors import StageEnded, UserError
from dpr_jax.training import TrainState, make_train_step
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.loop import Stage, Training, run_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.steps import abstract_state
from dpr_jax.training.stopping import last_step, read_stopped

OPTIMIZER = optax.adam(0.1)
DECAY = 0.7
CARRIED = dict(ema=True, control={"gain": 0.3})


class Killed(Exception):
  """Stands for a process that ends in the middle of a stage."""


class SeededBatches:
  """Batch t is a pure function of t; `kill_at` raises in its place."""

  def __init__(self, make, kill_at=None):
    self.make, self.next_step, self.kill_at = make, 0, kill_at

  def __iter__(self):
    return self

  def __next__(self):
    if self.next_step == self.kill_at:
      raise Killed
    self.next_step += 1
    return self.make(np.random.default_rng([7, self.next_step]))

  def get_state(self):
    return {"next_step": self.next_step}

  def set_state(self, state):
    self.next_step = state["next_step"]


@dataclasses.dataclass
class Doubling:
  """An algorithm with an average and a scalar that is doubled each step; ends before `end_at`."""

  train_step: object
  end_at: int | None = None
  seen: list = dataclasses.field(default_factory=list)

  def init(self, variables, rng, frozen=None):
    return TrainState.create(variables, OPTIMIZER, rng, frozen, **CARRIED)

  def abstract(self, variables, rng):
    return abstract_state(variables, OPTIMIZER, rng, **CARRIED)

  def __call__(self, state, batch):
    if self.end_at is not None and int(state.step) + 1 >= self.end_at:
      raise StageEnded(f"told to end at step {self.end_at}")
    self.seen.append(jax.device_get((state.trainable, state.ema)))
    control = {"gain": 2.0 * state.control["gain"]}
    state, metrics = self.train_step(state.replace(control={}), batch)
    return state.replace(control=control), metrics


@pytest.fixture
def make_training(loss_fn, make_rows, make_state, describe):
  """make_training(kill_at, end_at, seen) -> Training."""
  train_step = make_train_step(loss_fn, OPTIMIZER, ema_decay=DECAY)

  def make(kill_at=None, end_at=None, seen=None):
    place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    start = lambda: jax.device_put(make_state(OPTIMIZER, seed=2).trainable, place)
    return Training(
        step=Doubling(train_step, end_at, [] if seen is None else seen),
        batches=SeededBatches(make_rows, kill_at), start=start, abstract=describe(start()),
        rng=jax.random.key(2),
    )

  return make


@pytest.fixture
def stage(make_training):
  """stage(directory, **of make_training): 11 steps and a checkpoint every 4."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def run(directory, **how):
    what = Stage("stage", directory, mesh, 11, checkpoint=CheckpointSection(every=4),
                 log=LogSection(progress=False, tensorboard=False))
    with jax.set_mesh(mesh):
      return run_stage(what, lambda: make_training(**how))

  return run


def _bits(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(
      (state.step, state.trainable, state.ema, state.control, state.opt_state,
       jax.random.key_data(state.rng)))]


def _lines(directory):
  return [{k: v for k, v in line.items() if k != "seconds"}
          for line in read_metrics(directory / "metrics.jsonl")]


def _steps(directory):
  return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def test_the_average_is_that_of_the_weights_of_every_step(stage, tmp_path):
  seen = []
  state = stage(tmp_path, seen=seen)
  weights = [w for w, _ in seen] + [jax.device_get(state.trainable)]
  expected = jax.tree.map(np.float64, weights[0])
  for t, after in enumerate(weights):
    if t:
      expected = jax.tree.map(lambda a, w: DECAY * a + (1 - DECAY) * w, expected, after)
    average = seen[t][1] if t < len(seen) else jax.device_get(state.ema)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), average, expected)
  gap = jax.tree.map(lambda a, w: np.abs(a - w).max(), jax.device_get(state.ema), weights[-1])
  assert max(jax.tree.leaves(gap)) > 1e-2  # It lags.


@pytest.mark.parametrize("kills", [(0,), (5,), (8, 10)], ids=str)
def test_resumed_equals_uninterrupted_with_all_that_is_carried(stage, tmp_path, kills):
  whole = stage(tmp_path / "whole")
  for t in kills:
    with pytest.raises(Killed):
      stage(tmp_path / "cut", kill_at=t)
  resumed = stage(tmp_path / "cut")
  assert _bits(resumed) == _bits(whole)
  assert float(resumed.control["gain"]) == np.float32(0.3) * 2**11


def test_the_average_is_read_on_its_own(stage, tmp_path):
  state = stage(tmp_path)
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state.ema
  )
  with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
    for part, expected in (("ema", state.ema), ("variables", state.trainable)):
      got = checkpoints.restore_variables(11, like, part)
      jax.tree.map(
          lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(jnp.bfloat16)),
          got, expected,
      )


def test_a_stage_without_an_average_says_so(tmp_path, make_state):
  state = make_state(OPTIMIZER)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 1, {})
    checkpoints.wait()
    with pytest.raises(UserError, match="kept no moving average.*reference of kind ema"):
      checkpoints.restore_variables(1, state.trainable, "ema")


def test_a_flipped_bit_in_the_average_is_seen(stage, tmp_path):
  state = stage(tmp_path)
  files = [p for p in (tmp_path / "checkpoints" / "11" / "ema").rglob("*")
           if p.is_file() and p.parent.name == "d"]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.ema
  )
  with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
    with pytest.raises(UserError, match="cannot be read"):
      checkpoints.restore_variables(11, like, "ema")
    checkpoints.restore_variables(11, like)  # The weights are whole.


@pytest.mark.parametrize("end_at", [1, 4, 5, 7, 11])
def test_an_ended_stage_keeps_the_state_before_the_step_that_ended_it(
    stage, make_training, read_state, tmp_path, end_at
):
  seen = []
  stage(tmp_path / "whole", seen=seen)
  ended = stage(tmp_path / "ended", end_at=end_at)
  assert int(ended.step) == end_at - 1
  assert _steps(tmp_path / "ended") == [end_at - 1]
  jax.tree.map(
      np.testing.assert_array_equal, jax.device_get((ended.trainable, ended.ema)), seen[end_at - 1]
  )
  assert read_stopped(tmp_path / "ended") == {
      "step": end_at - 1, "steps": 11, "reason": f"told to end at step {end_at}"}
  assert last_step(tmp_path / "ended", 11) == end_at - 1 and last_step(tmp_path / "whole", 11) == 11
  assert [line["step"] for line in _lines(tmp_path / "ended")] == list(range(1, end_at))
  # It is over: any batch would raise, and the algorithm would go on.
  assert stage(tmp_path / "ended", kill_at=end_at - 1) is None
  assert _bits(read_state(make_training(), tmp_path / "ended")) == _bits(ended)


@pytest.mark.parametrize("kills", [(2,), (5,), (5, 6)], ids=str)
def test_an_interrupted_stage_ends_where_the_uninterrupted_one_did(stage, tmp_path, kills):
  whole = stage(tmp_path / "whole", end_at=8)
  for t in kills:
    with pytest.raises(Killed):
      stage(tmp_path / "cut", kill_at=t, end_at=8)
  resumed = stage(tmp_path / "cut", end_at=8)
  assert _bits(resumed) == _bits(whole)
  assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")
  assert read_stopped(tmp_path / "cut") == read_stopped(tmp_path / "whole")


def test_ended_between_its_last_checkpoint_and_its_record(stage, tmp_path):
  """A process that dies there ends again at the same step."""
  ended = stage(tmp_path, end_at=7)
  (tmp_path / "stopped.json").unlink()
  again = stage(tmp_path, end_at=7)
  assert _bits(again) == _bits(ended) and read_stopped(tmp_path)["step"] == 6
