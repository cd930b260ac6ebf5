"""The evaluation of a run: its prompts, metrics of a user, and what is not done twice."""

import dataclasses
import json
import types

import numpy as np
import pytest

from dpr_jax.config.fields import setting
from dpr_jax.data.loader import Prompts
from dpr_jax.errors import UserError
from dpr_jax.evaluation.evaluate import Evaluation, evaluate, heldout_prompts, systems_of
from dpr_jax.evaluation.metrics import (
    ACCURACY,
    Column,
    HeldoutNLL,
    ResponseMetric,
    SystemMetric,
    checked_measures,
    score_response,
)
from dpr_jax.evaluation.systems import System
from dpr_jax.pipeline import make_reference, report
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.workdir import read_lines


@pytest.mark.parametrize("num,skip,expected", [
    (3, 0, [0, 1, 2]), (3, 2, [2, 3, 4]), (0, 0, list(range(7))), (0, 5, [5, 6]),
])
def test_prompts_that_are_skipped_are_others(num, skip, expected):
  held = Prompts(tokens=list(range(7)), demos=list(range(7)), dropped_overlong=0)
  section = types.SimpleNamespace(num_prompts=num, skip_prompts=skip)
  run = types.SimpleNamespace(
      config=types.SimpleNamespace(eval=section), data=types.SimpleNamespace(heldout=held)
  )
  chosen = heldout_prompts(run)
  assert chosen.tokens == chosen.demos == expected


# --- Metrics of a user, on a run with a short SFT stage ------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vowels(ResponseMetric):
  """Letters of a response."""

  title, unit, better = "Vowels", "letters", 1
  which: str = setting("aeiou", "letters that count")

  def score(self, record):
    return sum(record["response"].count(letter) for letter in self.which)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surprise(SystemMetric):
  """How much less likely base finds a system's samples than the system itself does."""

  columns = {"surprise": Column("Surprise of base", "nats", main=True)}

  def applies(self, evaluation, system):
    return system.single

  def measure(self, evaluation, system, records):
    MEASURED.append(system.name)
    e = evaluation
    sampled = [np.asarray(r["token_ids"], np.int32) for r in records if r["mode"] == "sampled"]
    own, base = (
        e.scorer.reference_logps(judge, e.prompts.tokens, sampled)
        for judge in (e.members_as_reference(system), e.judge("base"))
    )
    return {"surprise": [float(a.sum() - b.sum()) for a, b in zip(own, base)]}


MEASURED = []  # the systems that `Surprise` was asked about.


@pytest.fixture(scope="module")
def run(train_sft):
  def change(config):
    config.compare = ("low_temperature",)
    config.eval.num_prompts = config.eval.batch_size = config.data.holdout = 8
    config.eval.corrupted_tokens = config.eval.heatmaps = config.eval.reference_prompts = 0
    config.eval.metrics.vowels, config.eval.metrics.surprise = Vowels(), Surprise()

  run = train_sft(change)
  make_reference(run)
  MEASURED.clear()
  evaluate(run)
  return run


def test_metrics_of_a_user_are_results_like_all_others(run):
  assert MEASURED == ["base", "ref", "sft"]  # A temperature has no likelihood of its own.
  results = report(run.workdir, [run.workdir], [run.config.seed])
  written = json.loads((run.workdir.report / "results.json").read_text())
  assert written == json.loads(json.dumps(results))
  for name in ("base", "ref", "sft", "low_temperature"):
    records = read_lines(run.workdir.system_file(name))
    for mode in {r["mode"] for r in records}:
      counts = [sum(r["response"].count(x) for x in "aeiou") for r in records if r["mode"] == mode]
      assert written["systems"][name][f"vowels_{mode}"]["mean"] == pytest.approx(np.mean(counts))
  assert written["columns"]["vowels_greedy"] == {
      **dataclasses.asdict(Column("Vowels, greedy", "letters", better=1)),
  }
  assert written["systems"]["base"]["surprise"]["mean"] == pytest.approx(0.0, abs=1e-4)
  assert written["systems"]["sft"]["surprise"]["mean"] > 0.1
  assert "surprise" not in written["systems"]["low_temperature"]
  compared = {(tuple(c["pair"]), c["metric"]) for c in written["comparisons"]}
  assert (("sft", "ref"), "surprise") in compared
  assert (("low_temperature", "sft"), "vowels_sampled") in compared
  assert "Vowels" in (run.workdir.report / "report.html").read_text(encoding="utf-8")


def test_records_say_what_benchmarks_and_metrics_say(run):
  records = read_lines(run.workdir.system_file("sft"))
  assert [r["mode"] for r in records] == ["sampled"] * 8 + ["greedy"] * 8
  for r in records:
    assert set(r["scores"]) == {"accuracy", "length", "eos_rate", "vowels"}
    assert r["correct"] == bool(r["scores"]["accuracy"]) and r["scores"]["length"] == r["length"]
    assert r["length"] == len(r["token_ids"]) <= 6 and r["groups"][0] == r["task"]


def test_what_is_measured_is_not_measured_again(run, with_config):
  path = run.workdir.measures_file
  before = {p: p.stat().st_mtime_ns for p in run.workdir.samples.rglob("*") if p.is_file()}
  MEASURED.clear()
  evaluate(run)
  assert MEASURED == []
  assert {p: p.stat().st_mtime_ns for p in before} == before
  whole = json.loads(path.read_text())
  part = json.loads(path.read_text())
  del part["values"]["ref"], part["values"]["sft"]["surprise"]
  part["values"]["sft"]["heldout_nll"][0] = 123.0  # As if it was made by what is there.
  path.write_text(json.dumps(part))
  evaluate(run, ["sft"])
  assert MEASURED == ["sft"]  # What is missing, of what is asked for.
  found = json.loads(path.read_text())
  assert "ref" not in found["values"]
  assert found["values"]["sft"]["heldout_nll"][0] == 123.0
  np.testing.assert_allclose(
      found["values"]["sft"]["surprise"], whole["values"]["sft"]["surprise"], atol=1e-5
  )
  path.write_text(json.dumps(part))
  evaluate(run)
  assert MEASURED == ["sft", "ref", "sft"]
  path.write_text(json.dumps(whole))


def test_without_metrics_there_is_accuracy(run, with_config):
  section = dataclasses.replace(run.config.eval, metrics={})
  other = with_config(run, eval=section)
  kept = run.workdir.system_file("base").read_text(), run.workdir.measures_file.read_text()
  run.workdir.system_file("base").unlink(), run.workdir.measures_file.unlink()
  try:
    evaluate(other, ["base"])
    assert {*read_lines(run.workdir.system_file("base"))[0]["scores"]} == {"accuracy"}
    found = json.loads(run.workdir.measures_file.read_text())
    assert set(found["columns"]) == {"accuracy"} and found["values"] == {"base": {}}
  finally:
    run.workdir.system_file("base").write_text(kept[0])
    run.workdir.measures_file.write_text(kept[1])


@pytest.mark.parametrize("found,named", [
    ({"accuracy": 1, "other": 1}, "the score other is not declared in `scores`"),
    ({}, "the score accuracy was not returned"),
    ({"accuracy": float("inf")}, "accuracy is inf; a score must be a finite number"),
    ({"accuracy": "no"}, "accuracy is 'no'; a score must be a finite number"),
    (None, "the scores are None"),
])
def test_scores_other_than_declared_are_refused(found, named):
  record = {"response": "x", "correct": False}
  with pytest.raises(UserError, match=f"^prompt 3: response 'x': {named}"):
    score_response(record, found, {"accuracy": ACCURACY}, {}, "prompt 3")


def test_a_metric_that_gives_no_number_is_named():
  metric = types.SimpleNamespace(score=lambda record: record["scores"]["accuracy"] * float("nan"))
  with pytest.raises(UserError, match="^prompt 3: response 'x': mine is nan"):
    score_response({"response": "x"}, {"accuracy": 1}, {"accuracy": ACCURACY}, {"mine": metric},
                   "prompt 3")


def test_measures_other_than_declared_are_refused():
  check = lambda found: checked_measures(HeldoutNLL(), found, "sft", 3)
  assert check({"heldout_nll": [1.0, 2.0]}) == {"heldout_nll": [1.0, 2.0]}  # One does not fit.
  assert check({"heldout_nll": []}) == {}
  assert checked_measures(Surprise(), {"surprise": range(3)}, "sft", 3) == {"surprise": [0, 1, 2]}
  with pytest.raises(UserError, match="Surprise of sft: surprise has 2 values.* of the 3 prompts"):
    checked_measures(Surprise(), {"surprise": [1.0, 2.0]}, "sft", 3)
  with pytest.raises(UserError, match="of sft: other is not declared in `columns`"):
    checked_measures(Surprise(), {"other": [1.0, 2.0, 3.0]}, "sft", 3)
  with pytest.raises(UserError, match="of sft: heldout_nll has 4 values"):
    check({"heldout_nll": [1.0] * 4})


def test_a_run_checks_what_a_benchmark_and_a_metric_return(run, with_config, monkeypatch):
  kept = run.workdir.system_file("base").read_text(), run.workdir.measures_file.read_text()
  run.workdir.system_file("base").unlink()
  try:
    with monkeypatch.context() as patch:
      patch.setattr(Vowels, "score", lambda self, record: float("nan"))
      with pytest.raises(UserError, match="^prompt 1: response .*: vowels is nan"):
        evaluate(run, ["base"])
    assert not run.workdir.system_file("base").exists()
    run.workdir.system_file("base").write_text(kept[0])
    run.workdir.measures_file.unlink()
    with monkeypatch.context() as patch:
      patch.setattr(Surprise, "measure", lambda self, *args: {"surprise": [0.0]})
      with pytest.raises(UserError, match="Surprise of base: surprise has 1 values"):
        evaluate(run, ["base"])
  finally:
    run.workdir.system_file("base").write_text(kept[0])
    run.workdir.measures_file.write_text(kept[1])


def test_the_members_of_the_last_system_are_held():
  loads = []

  def system(name):
    return System(name, load=lambda: loads.append(name) or (object(),))

  a, b = system("a"), system("b")
  evaluation = Evaluation(run=None)
  first = evaluation.members(a)
  assert evaluation.members(a) is first and loads == ["a"]
  second = evaluation.members(b)
  assert evaluation.members(b) is second and loads == ["a", "b"]
  assert evaluation.members(a) is not first and loads == ["a", "b", "a"]


def test_ref_answers_with_the_geometric_mean_of_its_members(run, with_config):
  several = with_config(run, reference=Ensemble(fractions=(0.1, 0.5), combine="mean_logp"))
  ref = systems_of(several)[1]
  assert ref.name == "ref" and ref.weights == (0.5, 0.5) and ref.single
  members = ref.load()
  assert len(members) == 2 and several.reference().members == members
  (alone,) = systems_of(run)[1].load()
  assert alone is run.reference().members[0]
