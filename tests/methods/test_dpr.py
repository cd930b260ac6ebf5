"""The DPR stage of a run with what its config can ask of the reward; on one SFT stage."""

import dataclasses
import shutil

import numpy as np
import pytest

from dpr_jax.stages.dpr import dpr_stage
from dpr_jax.training.metrics import read_metrics
from dpr_jax.training.stopping import read_stopped

pytestmark = pytest.mark.usefixtures("light_compilation")


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done."""

  def change(config):
    config.dpr.steps = 3
    config.dpr.optimizer.learning_rate, config.dpr.optimizer.warmup_steps = 0.02, 0

  return train_sft(change)


@pytest.fixture
def dpr(trained):
  """dpr(reference fields, **fields of config.dpr) -> lines of metrics.jsonl."""
  folder = trained.workdir.stage("dpr")

  def run_stage(reference=None, **fields):
    config = trained.config
    config = dataclasses.replace(
        config, dpr=dataclasses.replace(config.dpr, **fields),
        reference=dataclasses.replace(config.reference, **(reference or {})),
    )
    run = dataclasses.replace(trained, config=config)
    dpr_stage(run)
    lines = read_metrics(folder / "metrics.jsonl")
    assert run.finished("dpr", config.dpr.steps)
    run_stage.stopped = read_stopped(folder)
    shutil.rmtree(folder)
    return lines

  yield run_stage
  shutil.rmtree(folder, ignore_errors=True)


def test_a_steered_stage_with_transforms_and_a_verifier(dpr):
  plain = dpr()
  lines = dpr(transforms=("scale:0.5", "clip:0.1"), verifier_weight=0.5, target_kl=0.5)
  assert [line["step"] for line in lines] == [1, 2, 3]
  # The same rollouts at first: the reward that is logged is the raw one, the objective is not.
  assert lines[0]["reward"] == plain[0]["reward"]
  bound = 0.5 * 0.1 * lines[0]["response_length"] + 0.5 * lines[0]["verifier_score"]
  assert abs(lines[0]["shaped_reward"]) <= bound + 1e-5 < abs(plain[0]["shaped_reward"])
  assert [line["beta"] for line in plain] == [1.0] * 3
  assert lines[0]["beta"] == 1.0 and lines[1]["beta"] == pytest.approx(0.98)  # KL 0 is below 0.5.
  assert dpr.stopped is None


def test_a_budget_ends_the_stage(dpr):
  lines = dpr(kl_budget=1e-6)
  assert dpr.stopped["step"] == len(lines) < 3 and "kl_budget" in dpr.stopped["reason"]


def test_an_ensemble_rewards_like_its_members(dpr):
  """At the first step the policy is sft: the same samples, whatever the reference."""
  alone = [dpr({"fraction": f})[0]["reward"] for f in (0.1, 0.5)]
  ensemble = {"fractions": (0.1, 0.5)}
  mean = dpr({"kind": "ensemble_mean_logp", **ensemble})[0]["reward"]
  mixture = dpr({"kind": "ensemble_logmeanexp", **ensemble})[0]["reward"]
  assert mean == pytest.approx(np.mean(alone), abs=1e-4)
  assert min(alone) - np.log(2) * 6 < mixture < mean


@pytest.mark.slow
def test_centring_leaves_no_mean_reward(dpr):
  """The sum of r - E r has mean 0: over the batch it is small beside the reward."""
  plain = dpr({"fraction": 0.1}, batch_size=256, steps=1)[0]
  centred = dpr({"fraction": 0.1}, batch_size=256, steps=1, transforms=("centre",))[0]
  assert centred["reward"] == plain["reward"]
  assert abs(centred["shaped_reward"]) < 0.3 * abs(plain["shaped_reward"])
  unsure = dpr({"fraction": 0.1}, batch_size=256, steps=1, transforms=("mask_unsure:1e-9",))[0]
  assert unsure["shaped_reward"] == pytest.approx(0.0, abs=1e-6)
