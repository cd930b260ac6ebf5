"""References of a run: what is loaded, measured and chosen; and a stage that ended early."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dpr_jax.stages import reference as reference_lib
from dpr_jax.stages.evaluate import trained_systems
from dpr_jax.stages.reference import ref_stage
from dpr_jax.training.stopping import write_stopped

DECAY = 0.8


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done, with milestones and a moving average."""

  def change(config):
    config.reference.kind, config.reference.ema_decay = "ema", DECAY

  return train_sft(change)


def _with(run, **fields):
  """The run under another reference; its SFT stage serves them all."""
  section = dataclasses.replace(run.config.reference, **fields)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, reference=section))


def _measured(run):
  run.workdir.reference_file.unlink(missing_ok=True)
  ref_stage(run)
  return json.loads(run.workdir.reference_file.read_text())


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def _gap(a, b):
  gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), a, b)
  return max(jax.tree.leaves(gaps))


def test_each_kind_loads_its_checkpoints(trained):
  milestone = lambda step: trained.stage_variables("sft", step, "float32")
  average = trained.load("ref")
  _assert_equal(average, trained.stage_variables("sft", 10, "float32", "ema"))
  assert min(_gap(average, milestone(10)), _gap(average, milestone(5))) > 1e-4
  _assert_equal(_with(trained, kind="midrun", fraction=0.25).load("ref"), milestone(2))
  several = _with(trained, kind="ensemble_mean_logp", fractions=(0.1, 0.5))
  _assert_equal(several.load("ref"), (milestone(1), milestone(5)))
  assert several.ref_names == ("ref/0", "ref/1")
  _assert_equal(several.load("ref/1"), milestone(5))
  system = trained_systems(several)[1]
  assert system.name == "ref" and system.members == several.ref_names
  assert system.weights == (0.5, 0.5)


def test_measures_agree_between_single_references_and_their_ensembles(trained):
  """All are measured on the same samples of sft, so the tables can be held against each other."""
  table = _measured(_with(trained, kind="midrun", select="snr"))["candidates"]
  assert [c["step"] for c in table] == [1, 2, 5, 8]
  pick = [c["kl"] for c in table if c["fraction"] in (0.1, 0.5)]
  ensembles = {}
  for kind in ("ensemble_mean_logp", "ensemble_logmeanexp"):
    record = _measured(_with(trained, kind=kind, fractions=(0.1, 0.5)))
    (ensembles[kind],) = record["candidates"]
    assert ensembles[kind]["members"] == ["sft@1", "sft@5"]
  assert ensembles["ensemble_mean_logp"]["kl"] == pytest.approx(np.mean(pick), abs=1e-4)
  assert ensembles["ensemble_logmeanexp"]["kl"] < ensembles["ensemble_mean_logp"]["kl"]  # Jensen.
  sft_itself = _measured(_with(trained, kind="midrun", fraction=1.0))["candidates"][0]
  assert sft_itself["kl"] == sft_itself["snr"] == 0.0 and sft_itself["auc"] == 0.5
  assert sorted(c["kl"] for c in table)[-1] > 0.5  # The early ones are far.


@pytest.mark.parametrize("select,key", [("validation", "auc"), ("snr", "snr")])
def test_the_best_candidate_becomes_the_reference(trained, select, key):
  run = _with(trained, kind="midrun", select=select)
  record = _measured(run)
  best = max(record["candidates"], key=lambda c: c[key])
  assert record["fraction"] == best["fraction"] and record["select"] == select
  assert [m.step for m in run.ref_members] == [best["step"]]
  _assert_equal(run.load("ref"), run.stage_variables("sft", best["step"], "float32"))
  before = run.workdir.reference_file.read_text()
  ref_stage(run)  # Measured once: a run that goes on keeps its reference.
  assert run.workdir.reference_file.read_text() == before


def test_only_training_prompts_are_looked_at(trained, monkeypatch):
  seen = []
  plain = reference_lib.respond

  def spy(model, members, prompts, *args, **how):
    seen.extend(tuple(p.tolist()) for p in prompts)
    return plain(model, members, prompts, *args, **how)

  monkeypatch.setattr(reference_lib, "respond", spy)
  _measured(_with(trained, kind="midrun", select="snr"))
  training = {tuple(p.tolist()) for p in trained.data.prompts.tokens}
  heldout = {tuple(p.tolist()) for p in trained.data.heldout.tokens}
  assert len(seen) == 16 and set(seen) <= training and not set(seen) & heldout


def test_later_stages_take_what_a_stage_that_ended_early_left(trained):
  folder = trained.workdir.stage("dpr")
  shutil.copytree(trained.workdir.stage("sft") / "checkpoints", folder / "checkpoints")
  try:
    steps = trained.config.dpr.steps
    assert not trained.finished("dpr", steps)
    write_stopped(folder, 5, steps, "a reason")
    assert trained.finished("dpr", steps) and trained.last_step("dpr", steps) == 5
    _assert_equal(trained.load("dpr"), trained.stage_variables("sft", 5, "float32"))
    write_stopped(folder, 7, steps, "its checkpoint is lost")
    assert not trained.finished("dpr", steps)
  finally:
    shutil.rmtree(folder)


def test_the_matched_strength_with_a_kl_to_ref(trained):
  section = dataclasses.replace(trained.config.dpr, beta=0.5, beta_ref=0.25)
  run = dataclasses.replace(trained, config=dataclasses.replace(trained.config, dpr=section))
  # pi_sft^((1 + b1) / (b1 + b2)) pi_ref^((b2 - 1) / (b1 + b2)) is sft^(1 + alpha) ref^-alpha.
  assert run.contrastive_alpha == pytest.approx(1.5 / 0.75 - 1) == pytest.approx(0.75 / 0.75)


def test_the_matched_strength_of_the_controls_is_that_of_the_last_beta(trained):
  section = dataclasses.replace(trained.config.dpr, target_kl=1.0, beta=0.5)
  run = dataclasses.replace(trained, config=dataclasses.replace(trained.config, dpr=section))
  assert run.contrastive_alpha == 2.0
  folder = run.workdir.stage("dpr")
  folder.mkdir()
  try:
    lines = [{"step": 1, "beta": 0.5}, {"step": 2, "beta": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert run.contrastive_alpha == 4.0 and trained.contrastive_alpha == 1.0
  finally:
    shutil.rmtree(folder)
