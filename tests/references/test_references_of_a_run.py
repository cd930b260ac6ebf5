"""References of a run: what is loaded, measured and chosen; and a stage that ended early."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dpr_jax.errors import UserError
from dpr_jax.evaluation.responses import Responder
from dpr_jax.pipeline import make_reference
from dpr_jax.references.checkpoint import Checkpoint
from dpr_jax.references.ema import EMA
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.references.half_data import HalfData
from dpr_jax.references.midrun import Midrun
from dpr_jax.references.pretrained import Pretrained
from dpr_jax.references.selected import Selected
from dpr_jax.training.loop import Stage, run_stage
from dpr_jax.training.stopping import last_step, write_stopped

DECAY = 0.8


@pytest.fixture(scope="module")
def trained(train_sft):
  """A run whose SFT stage is done, with milestones and a moving average."""

  def change(config):
    config.reference = EMA(decay=DECAY)

  return train_sft(change)


@pytest.fixture
def under(trained, with_config):
  """under(reference) -> the run under it; its SFT stage serves them all."""
  return lambda reference: with_config(trained, reference=reference)


def _measured(run):
  run.workdir.reference_file.unlink(missing_ok=True)
  make_reference(run)
  return json.loads(run.workdir.reference_file.read_text())


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def _gap(a, b):
  gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()), a, b)
  return max(jax.tree.leaves(gaps))


def test_each_kind_loads_its_checkpoints(trained, under):
  milestone = lambda step: trained.checkpoint("sft", step, "float32")
  (average,) = trained.reference().members
  _assert_equal(average, trained.checkpoint("sft", 10, "float32", "ema"))
  assert min(_gap(average, milestone(10)), _gap(average, milestone(5))) > 1e-4
  members = lambda kind: under(kind).reference().members
  _assert_equal(members(Midrun(fraction=0.25)), (milestone(2),))
  _assert_equal(members(Pretrained()), (trained.initial_variables("float32"),))
  several = Ensemble(fractions=(0.1, 0.5), combine="mean_logp")
  _assert_equal(members(several), (milestone(1), milestone(5)))
  assert under(several).reference().combine == "mean_logp"
  kinds = [EMA(decay=DECAY), Midrun(fraction=0.25), Pretrained(), several]
  assert [kind.num_members for kind in kinds] == [1, 1, 1, 2]
  assert len({kind.describe() for kind in kinds}) == 4


def test_a_checkpoint_of_another_run_is_a_reference_if_it_fits(trained, under, train_sft):
  path = f"{trained.workdir.stage('sft')}@0.5"
  (found,) = under(Checkpoint(path=path)).reference().members
  _assert_equal(found, trained.checkpoint("sft", 5, "float32"))

  def change(config):
    config.model.shape.num_layers, config.sft.steps, config.sft.milestones = 1, 1, (1.0,)
    config.reference = Pretrained()

  other = train_sft(change)
  with pytest.raises(UserError, match="differs from the run's model in num_layers"):
    under(Checkpoint(path=str(other.workdir.stage("sft")))).reference()


def test_half_of_the_data_trains_a_reference_of_its_own(trained, under):
  run = under(HalfData(fraction=0.3))
  make_reference(run)
  try:
    assert [line["step"] for line in run.metrics("ref")] == [1, 2, 3]
    (found,) = run.reference().members
    assert _gap(found, trained.checkpoint("sft", 10, "float32")) > 1e-3
    before = run.metrics("ref")
    make_reference(run)  # It is made once.
    assert run.metrics("ref") == before
  finally:
    shutil.rmtree(run.workdir.stage("ref"))
    run.workdir.reference_file.unlink()


def test_measures_agree_between_single_references_and_their_ensembles(under):
  """All are measured on the same samples of sft, so the tables can be held against each other."""
  table = _measured(under(Selected(criterion="snr")))["candidates"]
  texts = [Midrun(fraction=f).describe() for f in (0.1, 0.25, 0.5, 0.75)]
  assert [c["text"] for c in table] == texts
  pick = [c["kl"] for c in table if c["text"] in (texts[0], texts[2])]
  ensembles = {}
  for combine in ("mean_logp", "logmeanexp"):
    kind = Ensemble(fractions=(0.1, 0.5), combine=combine)
    (ensembles[combine],) = _measured(under(kind))["candidates"]
    assert ensembles[combine]["text"] == kind.describe()
  assert ensembles["mean_logp"]["kl"] == pytest.approx(np.mean(pick), abs=1e-4)
  assert ensembles["logmeanexp"]["kl"] < ensembles["mean_logp"]["kl"]  # Jensen.
  sft_itself = _measured(under(Midrun(fraction=1.0)))["candidates"][0]
  assert sft_itself["kl"] == sft_itself["snr"] == 0.0 and sft_itself["auc"] == 0.5
  assert sorted(c["kl"] for c in table)[-1] > 0.5  # The early ones are far.


@pytest.mark.parametrize("criterion,key", [("validation", "auc"), ("snr", "snr")])
def test_the_best_candidate_becomes_the_reference(under, criterion, key):
  run = under(Selected(criterion=criterion))
  record = _measured(run)
  best = max(record["candidates"], key=lambda c: c[key])
  assert record["candidates"][record["chosen"]] == best
  step = (1, 2, 5, 8)[record["chosen"]]
  _assert_equal(run.reference().members, (run.checkpoint("sft", step, "float32"),))
  before = run.workdir.reference_file.read_text()
  make_reference(run)  # Measured once: a resumed run keeps its reference.
  assert run.workdir.reference_file.read_text() == before


def test_only_training_prompts_are_looked_at(trained, under, monkeypatch):
  seen = []
  plain = Responder.respond

  def spy(self, members, prompts, *args, **how):
    seen.extend(tuple(p.tolist()) for p in prompts)
    return plain(self, members, prompts, *args, **how)

  monkeypatch.setattr(Responder, "respond", spy)
  _measured(under(Selected(criterion="snr")))
  training = {tuple(p.tolist()) for p in trained.data.prompts.tokens}
  heldout = {tuple(p.tolist()) for p in trained.data.heldout.tokens}
  assert len(seen) == 16 and set(seen) <= training and not set(seen) & heldout


def test_nothing_is_measured_where_nothing_is_asked_for(under):
  run = under(Midrun())
  run.workdir.reference_file.unlink(missing_ok=True)
  section = dataclasses.replace(run.config.eval, reference_prompts=0)
  make_reference(dataclasses.replace(run, config=dataclasses.replace(run.config, eval=section)))
  assert not run.workdir.reference_file.exists()


def test_later_stages_take_what_a_stage_that_ended_early_left(trained):
  folder = trained.workdir.stage("dpr")
  shutil.copytree(trained.workdir.stage("sft"), folder)
  try:
    steps = trained.config.budget.steps
    assert last_step(folder, steps) == steps
    write_stopped(folder, 5, steps, "a reason")
    assert last_step(folder, steps) == 5
    _assert_equal(trained.result("dpr"), trained.checkpoint("sft", 5, "float32"))

    class Built(Exception):
      pass

    def build():
      raise Built

    stage = Stage("dpr", folder, trained.mesh, steps)
    assert run_stage(stage, build) is None  # It does not go on.
    write_stopped(folder, 7, steps, "its checkpoint is lost")
    with pytest.raises(Built):
      run_stage(stage, build)
  finally:
    shutil.rmtree(folder)
