"""Methods that need no training: their strength, and the models that they combine."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dpr_jax.methods import DPR
from dpr_jax.methods.training_free import (
    Contrastive,
    LowTemperature,
    Resampled,
    WeightExtrapolation,
)
from dpr_jax.references.ensemble import Ensemble

KINDS = [Contrastive, WeightExtrapolation, Resampled]


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done."""
  return train_sft(lambda config: None)


@pytest.fixture
def weights():
  flat = lambda v: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(v)])
  return flat


@pytest.mark.parametrize("kind", KINDS)
def test_the_matched_strength_is_that_of_the_optimum(trained, with_config, kind):
  run = with_config(
      trained, dpr=DPR(beta=0.5, beta_ref=0.25), other=DPR(beta=0.2), pull=DPR(beta_ref=3.0)
  )
  # pi_sft^((1 + b1) / (b1 + b2)) pi_ref^((b2 - 1) / (b1 + b2)) is sft^(1 + alpha) ref^-alpha.
  assert kind().alpha(run) == pytest.approx(1.5 / 0.75 - 1) == pytest.approx(0.75 / 0.75)
  assert kind(optimum_of="other").alpha(run) == pytest.approx(5.0)
  assert kind(optimum_of="pull").alpha(run) == pytest.approx(-0.5)  # From sft back to ref.
  assert kind(strength=0.3).alpha(run) == 0.3
  assert kind().refers() == ("dpr",) and kind(strength=0.3).refers() == ()
  assert kind(optimum_of="other").refers() == ("other",)


def test_the_matched_strength_is_that_of_the_last_beta(trained, with_config):
  run = with_config(trained, dpr=DPR(target_kl=1.0, beta=0.5))
  assert Contrastive().alpha(run) == 2.0
  folder = run.workdir.stage("dpr")
  folder.mkdir()
  try:
    lines = [{"step": 1, "beta": 0.5}, {"step": 2, "beta": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert Contrastive().alpha(run) == 4.0
    assert Contrastive().alpha(with_config(trained, dpr=DPR())) == 1.0  # Its beta is fixed.
  finally:
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_without_an_optimum_is_refused(trained, with_config, kind):
  config = with_config(trained, dpr=DPR(beta=0.0)).config
  with pytest.raises(ValueError, match="optimum_of='dpr' is not .* above 0; set strength"):
    kind().check(config)
  with pytest.raises(ValueError, match="optimum_of='nothing' is not a DPR method"):
    kind(optimum_of="nothing").check(config)
  kind(strength=1.0, optimum_of="nothing").check(config)
  with pytest.raises(ValueError, match="optimum_of='contrastive' is not a DPR method"):
    kind(optimum_of="contrastive").check(config)
  config = dataclasses.replace(with_config(trained, dpr=DPR(target_kl=1.0)).config, compare=())
  with pytest.raises(ValueError, match=r"methods.dpr.target_kl adapts beta .* add it, or set str"):
    kind().check(config)


def test_contrastive_decoding_weighs_the_members_of_the_reference(trained, with_config, weights):
  run = with_config(trained, reference=Ensemble(fractions=(0.1, 0.5)))
  system = Contrastive(strength=0.5).system(run, "c")
  assert system.weights == (1.5, -0.25, -0.25) and sum(system.weights) == pytest.approx(1.0)
  members = system.load()
  for member, expected in zip(
      members, (run.sft(), *(run.checkpoint("sft", s, run.dtype) for s in (1, 5))), strict=True
  ):
    np.testing.assert_array_equal(weights(member), weights(expected))
  assert system.modes == ("sampled", "greedy") and system.is_distribution and not system.single


def test_weights_are_extrapolated_from_the_mean_of_the_reference(trained, with_config, weights):
  run = with_config(trained, reference=Ensemble(fractions=(0.1, 0.5)))
  system = WeightExtrapolation(strength=0.5).system(run, "w")
  (found,) = system.load()
  sft, *refs = (weights(run.checkpoint("sft", step, "float32")) for step in (10, 1, 5))
  np.testing.assert_allclose(weights(found), sft + 0.5 * (sft - np.mean(refs, 0)), atol=1e-6)
  assert system.single and system.on_frontier


def test_what_changes_the_temperature_alone_lies_on_the_curve_of_sft(trained, weights):
  system = LowTemperature(temperature=0.3).system(trained, "t")
  assert (system.temperature, system.modes) == (0.3, ("sampled",))
  assert not system.on_frontier and not system.single  # Its likelihood would be that of SFT.
  np.testing.assert_array_equal(weights(system.load()), weights(trained.sft()))


def test_resampling_answers_with_one_of_its_candidates(trained):
  system = Resampled(candidates=4, strength=0.7).system(trained, "r")
  assert (system.candidates, system.alpha, system.modes) == (4, 0.7, ("sampled",))
  assert not system.is_distribution
  assert dataclasses.is_dataclass(system) and len(system.load()) == 1
