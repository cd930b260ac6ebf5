"""Dense-Path REINFORCE as a stage: a steered beta, a KL budget and a verifier, and resumption."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax import sharding
from dpr_jax.config.sections import CheckpointSection, LogSection
from dpr_jax.data.loader import prompt_batches
from dpr_jax.losses import make_reinforce_loss, reinforce_batch
from dpr_jax.rewards.control import KLControl
from dpr_jax.rollout import make_rollout_step
from dpr_jax.training import make_train_step
from dpr_jax.training.dpr_step import DPRStep
from dpr_jax.training.loop import Stage, Training, run_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.stopping import read_stopped

OPTIMIZER = optax.adam(5e-2)
STEPS, EOS = 6, 1


class Killed(Exception):
  """Stands for a process that ends in the middle of a stage."""


@dataclasses.dataclass
class KilledAt:
  """Batches that end with an exception in the place of batch `kill_at`."""

  batches: object
  kill_at: int | None

  def __iter__(self):
    return self

  def __next__(self):
    if self.batches.get_state()["next_step"] == self.kill_at:
      raise Killed
    return next(self.batches)

  def get_state(self):
    return self.batches.get_state()

  def set_state(self, state):
    self.batches.set_state(state)


@dataclasses.dataclass(frozen=True)
class Watched(DPRStep):
  """Also keeps the policy before each step."""

  seen: list = dataclasses.field(default_factory=list)

  def __call__(self, state, prompts):
    self.seen.append(jax.device_get(state.trainable))
    return super().__call__(state, prompts)


@pytest.fixture
def make_training(make_model, describe, rng):
  """make_training(kill_at, seen, make_verify, verifier_weight, **fields of KLControl)."""
  seeds = [int(s) for s in rng.integers(0, 1 << 30, 2)]
  (model, sft), (_, ref) = (make_model(s, vocab_size=5, num_layers=1) for s in seeds)
  prompts = [rng.integers(2, 5, n).astype(np.int32) for n in rng.integers(1, 4, 7)]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  sft, ref = jax.device_put((sft, ref), sharding.replicated(mesh))
  rollout_step = make_rollout_step(model, max_new_tokens=4, stop_ids=(EOS,))
  train_step = make_train_step(make_reinforce_loss(model), OPTIMIZER)

  def make(kill_at=None, seen=None, make_verify=None, verifier_weight=0.0, beta=0.5, **control):
    batches = prompt_batches(prompts, 32, 3, seed=5)
    step = Watched(
        rollout_step=rollout_step, train_step=train_step,
        make_batch=functools.partial(reinforce_batch, external_weight=verifier_weight),
        control=KLControl(beta, **control), sft=sft, ref=ref, rng=jax.random.key(3),
        verify=make_verify(batches) if make_verify else None, seen=[] if seen is None else seen,
    )
    return Training(
        step=step, batches=KilledAt(batches, kill_at), start=lambda: jax.tree.map(jnp.array, sft),
        abstract=describe(sft), rng=jax.random.key(1),
    )

  return make


@pytest.fixture
def stage(make_training):
  """stage(directory, **of make_training): six steps, a checkpoint every two."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def run(directory, **how):
    what = Stage("dpr", directory, mesh, STEPS, checkpoint=CheckpointSection(every=2),
                 log=LogSection(progress=False, tensorboard=False))
    with jax.set_mesh(mesh):
      return run_stage(what, lambda: make_training(**how))

  return run


def _bits(state):
  return [np.asarray(x).tobytes()
          for x in jax.tree.leaves((state.step, state.trainable, state.control, state.opt_state))]


def _lines(directory):
  return [{k: v for k, v in line.items() if k != "seconds"}
          for line in read_metrics(directory / "metrics.jsonl")]


def test_a_steered_beta_is_logged_and_survives_an_interruption(stage, tmp_path):
  how = {"target_kl": 0.2, "beta_gain": 0.5}
  whole = stage(tmp_path / "whole", **how)
  lines = _lines(tmp_path / "whole")
  beta = 0.5
  for line in lines:
    assert line["beta"] == pytest.approx(beta, rel=1e-5)
    beta *= 1 + 0.5 * max(-0.2, min(0.2, (line["kl"] - 0.2) / 0.2))
  assert float(whole.control["beta"]) == pytest.approx(beta, rel=1e-5)
  assert beta != pytest.approx(0.5, rel=1e-3)
  with pytest.raises(Killed):
    stage(tmp_path / "cut", kill_at=3, **how)
  resumed = stage(tmp_path / "cut", **how)
  assert _bits(resumed) == _bits(whole) and _lines(tmp_path / "cut") == lines


def test_a_fixed_beta_is_logged_and_nothing_is_carried(stage, tmp_path):
  state = stage(tmp_path)
  assert state.control == {} and {line["beta"] for line in _lines(tmp_path)} == {0.5}


@pytest.mark.parametrize("control, carried", [
    ({}, set()), ({"target_kl": 1.0}, {"beta"}), ({"kl_budget": 1.0}, {"kl_mean", "kl_count"}),
])
def test_a_state_is_made_as_it_is_described(make_training, describe, control, carried):
  training = make_training(**control)
  state = training.step.init(training.start(), training.rng)
  assert describe(state) == training.step.abstract(training.abstract, training.rng)
  assert set(state.control) == carried


def test_a_budget_ends_the_stage_before_the_step_that_exceeds_it(
    stage, make_training, read_state, tmp_path
):
  free = stage(tmp_path / "free", kl_budget=1e9)
  means = [line["kl_mean"] for line in _lines(tmp_path / "free")]
  kls = [line["kl"] for line in _lines(tmp_path / "free")]
  np.testing.assert_allclose(means, [np.mean(kls[: i + 1]) for i in range(STEPS)], atol=1e-5)
  assert int(free.step) == STEPS and read_stopped(tmp_path / "free") is None
  # A budget between the largest mean so far and the next: the first step over it is known.
  over = next(i for i in range(1, STEPS) if means[i] > max(means[:i]))
  budget = (max(means[:over]) + means[over]) / 2
  seen = []
  ended = stage(tmp_path / "ended", kl_budget=budget, seen=seen)
  assert int(ended.step) == over  # Step over + 1 was not made.
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(ended.trainable), seen[-1])
  record = read_stopped(tmp_path / "ended")
  assert record["step"] == over and f"kl_budget={budget:g}" in record["reason"]
  assert _lines(tmp_path / "ended") == _lines(tmp_path / "free")[:over]
  with pytest.raises(Killed):
    stage(tmp_path / "cut", kill_at=over - 1, kl_budget=budget)
  resumed = stage(tmp_path / "cut", kl_budget=budget)
  assert _bits(resumed) == _bits(ended) and read_stopped(tmp_path / "cut") == record
  assert stage(tmp_path / "ended", kill_at=over, kl_budget=budget) is None
  saved = read_state(make_training(kl_budget=budget), tmp_path / "ended")
  assert _bits(saved) == _bits(ended)


def test_a_verifier_sees_each_row_with_its_prompt_and_enters_the_reward(stage, tmp_path):
  calls = []

  def make_verify(batches):
    def verify(step, rollout):
      first = np.asarray(rollout.tokens)[:, 3]  # rewards a first token of 2.
      none = np.arange(len(first)) % 3 == step % 3
      scores = np.where(none, np.nan, first == 2).astype(np.float32)
      calls.append((step, batches.item_indices(step), np.asarray(rollout.prompt_lengths), scores))
      return scores
    return verify

  stage(tmp_path / "whole", make_verify=make_verify, verifier_weight=0.7)
  lines = _lines(tmp_path / "whole")
  assert [c[0] for c in calls] == list(range(STEPS))
  lengths = {}
  for _, items, prompt_lengths, _ in calls:
    for item, length in zip(items.tolist(), prompt_lengths.tolist(), strict=True):
      assert lengths.setdefault(item, length) == length  # the row's own prompt.
  assert len(set(lengths.values())) > 1
  for line, call in zip(lines, calls, strict=True):
    assert line["verifier_score"] == pytest.approx(np.nanmean(call[3]), abs=1e-6)
    assert line["verifier_unscored"] == pytest.approx(np.isnan(call[3]).mean())
  assert 0 < np.mean([np.isnan(call[3]).any() for call in calls])
  whole = list(calls)
  calls.clear()
  with pytest.raises(Killed):
    stage(tmp_path / "cut", kill_at=3, make_verify=make_verify, verifier_weight=0.7)
  stage(tmp_path / "cut", make_verify=make_verify, verifier_weight=0.7)
  assert _lines(tmp_path / "cut") == lines
  np.testing.assert_array_equal(calls[-1][3], whole[-1][3])


def test_full_weight_on_the_verifier_leaves_no_dense_reward(make_model, rng):
  seeds = [int(s) for s in rng.integers(0, 1 << 30, 2)]
  (model, sft), (_, ref) = (make_model(s, vocab_size=5, num_layers=1) for s in seeds)
  batches = prompt_batches([rng.integers(2, 5, 3).astype(np.int32)] * 4, 4, 3, seed=5)
  rollout = make_rollout_step(model, max_new_tokens=4, stop_ids=(EOS,))(
      sft, sft, ref, next(batches), jax.random.key(0)
  )
  scores = np.arange(4, dtype=np.float32)
  batch, metrics = reinforce_batch(rollout, beta=1.0, external=scores, external_weight=1.0)
  expected = np.where(np.asarray(batch.mask) > 0, scores[:, None], 0.0)
  np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)  # KL is 0: policy is sft.
  assert math.isclose(float(metrics["shaped_reward"]), 1.5, abs_tol=1e-5)
