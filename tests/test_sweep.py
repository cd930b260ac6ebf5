"""Sweeps: which points there are, what they share, and the order in which things happen."""

import dataclasses
import json
import pathlib
import types

import pytest

from dpr_jax import config as config_lib
from dpr_jax import pipeline, sweep
from dpr_jax.config import RunConfig, SweepSection
from dpr_jax.errors import UserError
from dpr_jax.main import parse
from dpr_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[1]


def swept(field, *values, **sections):
  return RunConfig(sweep=SweepSection(field, values), **sections)


def test_points_differ_in_the_field_alone():
  config = swept("dpr.beta", "0.5", "2", "1e-1")
  found = sweep.points(config)
  assert [p.name for p in found] == ["beta=0.5", "beta=2", "beta=1e-1"]
  assert [p.config.dpr.beta for p in found] == [0.5, 2.0, 0.1]
  for p in found:
    back = dataclasses.replace(
        p.config, dpr=dataclasses.replace(p.config.dpr, beta=1.0), sweep=config.sweep
    )
    assert back == config and p.config.sweep == SweepSection()


@pytest.mark.parametrize("field,value,parsed", [
    ("dpr.steps", "7", 7), ("dpr.returns", "per_token", "per_token"), ("seed", None, None),
    ("dpr.optimizer.learning_rate", "3e-4", 3e-4), ("log.progress", None, None),
    ("data.corrupt", "0.25", 0.25), ("model.shape.tied_head", "False", False),
])
def test_values_take_the_type_of_their_field(field, value, parsed):
  if value is None:  # Not of what a point may differ in.
    with pytest.raises(UserError, match=f"config.sweep.field='{field}'"):
      sweep.points(swept(field, "1"))
    return
  (point,) = sweep.points(swept(field, value))
  found = config_lib._get(point.config, field)
  assert found == parsed and type(found) is type(parsed)


@pytest.mark.parametrize("field,values,named", [
    ("dpr.betta", ("1",), ["config.sweep.field='dpr.betta'", "did you mean 'beta'"]),
    ("dprr.beta", ("1",), ["config.sweep.field='dprr.beta'", "did you mean 'dpr'"]),
    ("dpr", ("1",), ["config.sweep.field='dpr' is a section", "dpr.steps"]),
    ("dpr.beta.x", ("1",), ["'beta' is a field, not a section"]),
    ("data.tasks", ("add",), ["config.sweep.field='data.tasks'", "only a number"]),
    ("sweep.field", ("a",), ["'sweep' is not a field to sweep over"]),
    ("dpr.beta", (), ["config.sweep.values is empty"]),
    ("dpr.beta", ("0.5", "much"), ["config.sweep.values: 'much' must be of type float"]),
    ("dpr.steps", ("1.5",), ["'1.5' must be of type int", "config.dpr.steps"]),
    ("model.shape.tied_head", ("yes",), ["'yes' must be True or False"]),
    ("dpr.gamma", ("1", "2"), ["config.sweep.values: at '2': config.dpr.gamma=2.0", "at most 1"]),
    ("dpr.gamma", ("nan",), ["at 'nan': config.dpr.gamma=nan must be a finite number"]),
    ("dpr.returns", ("sometimes",), ["at 'sometimes': config.dpr.returns='sometimes'"]),
    ("dpr.beta", ("1", "1.0"), ["'1' and '1.0' are the same value"]),
    ("data.demos", ("a/b", "a_b"), ["do not give folders of different names"]),
    ("reference.fraction", ("0.5", "0.3"), ["at '0.3'", "add it to config.sft.milestones"]),
])
def test_what_cannot_be_swept_is_refused(field, values, named):
  with pytest.raises(UserError) as caught:
    sweep.points(swept(field, *values))
  assert "\n" not in str(caught.value)
  assert all(part in str(caught.value) for part in named), str(caught.value)


def test_values_without_a_field_are_refused():
  with pytest.raises(UserError, match="config.sweep.values .* without config.sweep.field"):
    config_lib.resolve(config_lib.to_json(swept("", "1")))


def test_what_is_shared():
  assert sweep.shared(swept("dpr.gamma", "0")).stages == ("sft",)
  half = RunConfig().reference.__class__(kind="half_data", fraction=0.5)
  assert sweep.shared(swept("dpr.gamma", "0", reference=half)).stages == ("sft", "ref")
  assert sweep.shared(swept("reference.fraction", "0.5", reference=half)).stages == ("sft",)
  assert sweep.shared(swept("data.corrupt", "0")) == sweep.Shared()
  # The strength of the controls is 1 / beta: they are the same unless beta is swept.
  assert "contrastive" in sweep.shared(swept("dpr.gamma", "0")).evaluated
  assert "contrastive" not in sweep.shared(swept("dpr.beta", "1")).evaluated
  assert "ref" not in sweep.shared(swept("reference.fraction", "0.5")).evaluated


def test_adopting_again_changes_nothing(tmp_path):
  whole, point = Workdir(tmp_path), Workdir(tmp_path / "beta=1")
  for file in ("sft/checkpoints/3", "samples/sft.jsonl", "samples/heldout_nll.json",
               "samples/ref.jsonl", "samples/expert.json"):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file)
  point.path.mkdir()
  what = sweep.Shared(("sft", "ref"), ("base", "sft"))
  sweep.adopt(what, whole, point)
  assert (point.stage("sft") / "checkpoints" / "3").read_text() == "sft/checkpoints/3"
  assert not point.stage("ref").exists()  # There is none to share.
  names = {p.name for p in point.samples.iterdir()}
  assert names == {"sft.jsonl", "heldout_nll.json", "expert.json"}
  (point.samples / "heldout_nll.json").write_text("more")
  sweep.adopt(what, whole, point)
  assert (point.samples / "heldout_nll.json").read_text() == "more"
  moved = tmp_path.rename(tmp_path.with_name("moved"))  # Links are relative.
  assert (moved / "beta=1" / "sft" / "checkpoints" / "3").exists()


@pytest.fixture
def calls(monkeypatch):
  """The pipeline with stages that note their names, and make the files that say they are done."""
  made, fail = [], []

  def fake_set_up(config, workdir, mesh, like=None):
    workdir.check(config)
    workdir.path.mkdir(parents=True, exist_ok=True)
    record = {"config": config_lib.to_json(config)}
    workdir.config_file.write_text(json.dumps(record))
    return types.SimpleNamespace(config=config, workdir=workdir)

  def trains(name):
    def stage(run):
      folder = run.workdir.stage(name)
      if folder.exists():
        return
      if (run.workdir.path.name, name) in fail:
        raise KeyboardInterrupt
      folder.mkdir()
      made.append((run.workdir.path.name, name))
    return stage

  def evaluates(run, only=None):
    todo = ("sft", "dpr") if only is None else [n for n in only if n == "sft"]
    for name in todo:
      file = run.workdir.samples / f"{name}.jsonl"
      if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        made.append((run.workdir.path.name, f"evaluate {name}"))

  monkeypatch.setattr(pipeline, "set_up", fake_set_up)
  monkeypatch.setattr(pipeline, "sft_stage", trains("sft"))
  monkeypatch.setattr(pipeline, "ref_stage", lambda run: None)
  monkeypatch.setattr(pipeline, "dpr_stage", trains("dpr"))
  monkeypatch.setattr(pipeline, "evaluate_stage", evaluates)
  monkeypatch.setattr(pipeline, "plausibility_stage", lambda run: None)
  monkeypatch.setattr(pipeline, "report_stage", lambda *a: made.append("report") or {})
  monkeypatch.setattr(pipeline, "sweep_report", lambda *a: made.append("sweep report") or {})
  monkeypatch.setattr(pipeline, "keep_compilations", lambda path, default: None)
  return types.SimpleNamespace(made=made, fail=fail)


NO_BASELINES = config_lib.BaselineSection(names=())


def test_shared_stages_run_once_and_first(calls, tmp_path):
  config = swept("dpr.beta", "1", "2", baseline=NO_BASELINES)
  pipeline.run(config, str(tmp_path / "s"))
  assert calls.made == [
      ("s", "sft"), ("s", "evaluate sft"),
      ("beta=1", "dpr"), ("beta=1", "evaluate dpr"), "report",
      ("beta=2", "dpr"), ("beta=2", "evaluate dpr"), "report",
      "sweep report",
  ]


def test_shared_systems_are_held_against_the_expert_once(calls, tmp_path, monkeypatch):
  """After their evaluation, and before the points take over what is known of them."""

  def fake(run, only=None):
    calls.made.append((run.workdir.path.name, "all" if only is None else only))

  monkeypatch.setattr(pipeline, "expert_stage", fake)
  config = swept("dpr.beta", "1", baseline=NO_BASELINES)
  pipeline.run(config, str(tmp_path / "s"))
  shared = sweep.shared(config).evaluated
  assert calls.made == [
      ("s", "sft"), ("s", "evaluate sft"), ("s", shared),
      ("beta=1", "dpr"), ("beta=1", "evaluate dpr"), ("beta=1", "all"), "report", "sweep report",
  ]


def test_an_interrupted_sweep_goes_on(calls, tmp_path):
  config = swept("dpr.beta", "1", "2", baseline=NO_BASELINES)
  calls.fail.append(("beta=2", "dpr"))
  with pytest.raises(KeyboardInterrupt):
    pipeline.run(config, str(tmp_path / "s"))
  calls.fail.clear()
  del calls.made[:]
  pipeline.run(config, str(tmp_path / "s"))
  assert calls.made == [
      "report", ("beta=2", "dpr"), ("beta=2", "evaluate dpr"), "report", "sweep report"
  ]


def test_every_seed_shares_its_own_sft(calls, tmp_path):
  config = swept("dpr.beta", "1", "2", baseline=NO_BASELINES, seeds=2)
  pipeline.run(config, str(tmp_path / "s"))
  trained = [c for c in calls.made if c[1] in ("sft", "dpr")]
  assert [c[0] for c in trained] == [
      "seed_0", "beta=1", "beta=2", "seed_1", "beta=1", "beta=2"
  ]
  assert calls.made[-1] == "sweep report" and calls.made.count("sweep report") == 3
  records = [
      json.loads((tmp_path / "s" / f"seed_{s}" / "beta=2" / "config.json").read_text())
      for s in (0, 1)
  ]
  assert [r["config"]["seed"] for r in records] == [0, 1]


def test_what_is_not_shared_is_trained_at_every_point(calls, tmp_path):
  config = swept("data.corrupt", "0", "0.5", baseline=NO_BASELINES)
  pipeline.run(config, str(tmp_path / "s"))
  assert [c for c in calls.made if c[1] == "sft"] == [("corrupt=0", "sft"), ("corrupt=0.5", "sft")]


def test_nothing_is_written_if_a_point_is_wrong(calls, tmp_path):
  with pytest.raises(UserError, match="config.dpr.gamma"):
    pipeline.run(swept("dpr.gamma", "1", "3"), str(tmp_path / "s"))
  assert not (tmp_path / "s").exists() and not calls.made


def test_another_sweep_is_refused(calls, tmp_path):
  pipeline.run(swept("dpr.beta", "1", baseline=NO_BASELINES), str(tmp_path / "s"))
  with pytest.raises(UserError, match="config.sweep.values"):
    pipeline.run(swept("dpr.beta", "1", "2", baseline=NO_BASELINES), str(tmp_path / "s"))


@pytest.mark.parametrize("name,field,count", [
    ("reference_fraction", "reference.fraction", 9), ("beta", "dpr.beta", 5),
    ("gamma", "dpr.gamma", 4), ("reward", "dpr.reward", 3), ("temperature", "dpr.temperature", 4),
    ("returns", "dpr.returns", 3),
])
@pytest.mark.parametrize("arg", ["", ":debug"])
def test_the_sweeps_of_configs_are_valid(name, field, count, arg, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # They find the config that they are based on from anywhere.
  path = ROOT / "configs" / "sweeps" / f"{name}.py{arg}"
  config, *_ = parse([f"--config={path}", "--workdir=unused"])
  found = sweep.points(config)
  assert config.sweep.field == field and len(found) == count
  for point in found:  # Settings are chosen on other prompts than those reported.
    assert point.config.eval.skip_prompts >= read_smoke(arg).eval.num_prompts > 0
  if name == "gamma":
    assert [p.config.dpr.gamma for p in found] == [0, 0.9, 0.99, 1]
  if name == "reference_fraction":
    assert [p.config.reference.fraction for p in found] == [i / 10 for i in range(1, 10)]


def read_smoke(arg):
  config, *_ = parse([f"--config={ROOT}/configs/smoke.py{arg}", "--workdir=unused"])
  return config


def test_every_sweep_of_configs_is_covered():
  assert {p.stem for p in (ROOT / "configs" / "sweeps").glob("*.py")} == {
      "reference_fraction", "beta", "gamma", "reward", "temperature", "returns"
  }


def test_a_sweep_from_the_command_line():
  config, *_ = parse([
      f"--config={ROOT}/configs/smoke.py:debug", "--workdir=unused",
      "--config.sweep.field=dpr.beta", "--config.sweep.values=0.5,2",
  ])
  assert [p.value for p in sweep.points(config)] == ["0.5", "2"]
