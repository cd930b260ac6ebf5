"""Sweeps: which points there are, what they share, and the order in which things happen."""

import dataclasses
import json
import pathlib

import jax
import pytest

from dpr_jax import config as config_lib
from dpr_jax import pipeline, sweep
from dpr_jax.config import RunConfig, setting
from dpr_jax.config.sections import SweepSection
from dpr_jax.errors import UserError
from dpr_jax.evaluation.systems import System
from dpr_jax.main import parse
from dpr_jax.methods import DPR, TrainedMethod
from dpr_jax.references.ema import EMA
from dpr_jax.references.half_data import HalfData
from dpr_jax.references.selected import Selected
from dpr_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[1]


def swept(field, *values, **sections):
  """A resolved run that sweeps over a field; methods are added to those of the package."""
  methods = {**RunConfig().methods, **sections.pop("methods", {})}
  config = RunConfig(sweep=SweepSection(field, values), methods=methods, **sections)
  return config_lib.resolve(config_lib.to_json(config))


def test_points_differ_in_the_field_alone():
  config = swept("methods.dpr.beta", "0.5", "2", "1e-1")
  found = sweep.points(config)
  assert [p.name for p in found] == ["beta=0.5", "beta=2", "beta=1e-1"]
  assert [p.config.methods["dpr"].beta for p in found] == [0.5, 2.0, 0.1]
  for p in found:
    dpr = dataclasses.replace(p.config.methods["dpr"], beta=1.0)
    back = dataclasses.replace(
        p.config, methods={**p.config.methods, "dpr": dpr}, sweep=config.sweep
    )
    assert back == config and p.config.sweep == SweepSection()


def test_a_sweep_over_kinds_takes_their_defaults():
  found = sweep.points(swept("reference", "midrun", "ema", "pretrained"))
  assert [p.name for p in found] == ["reference=midrun", "reference=ema", "reference=pretrained"]
  assert [p.config.reference.kind for p in found] == ["midrun", "ema", "pretrained"]
  dpr = {"dpr": DPR(returns="reward_to_go")}
  found = sweep.points(swept("methods.dpr.reward", "log_likelihood", "endogenous", methods=dpr))
  assert [p.config.methods["dpr"].reward.kind for p in found] == ["log_likelihood", "endogenous"]
  with pytest.raises(UserError, match="at 'emma': config.reference.kind='emma' is not one of"):
    sweep.points(swept("reference", "emma"))


@pytest.mark.parametrize("field,value,parsed", [
    ("methods.dpr.steps", "7", 7), ("methods.dpr.returns", "per_token", "per_token"),
    ("seed", None, None),
    ("methods.dpr.optimizer.learning_rate", "3e-4", 3e-4), ("log.progress", None, None),
    ("budget.steps", "9", 9), ("methods.spin.beta", None, None), ("compare", None, None),
    ("data.corrupt", "0.25", 0.25), ("model.shape.tied_head", "False", False),
])
def test_values_take_the_type_of_their_field(field, value, parsed):
  if value is None:  # Not of what a point may differ in.
    with pytest.raises(UserError, match=f"config.sweep.field='{field}'"):
      sweep.points(swept(field, "1"))
    return
  (point,) = sweep.points(swept(field, value))
  found = point.config
  for name in field.split("."):
    found = found[name] if isinstance(found, dict) else getattr(found, name)
  assert found == parsed and type(found) is type(parsed)


@pytest.mark.parametrize("field,values,named", [
    ("methods.dpr.betta", ("1",),
     ["config.sweep.field='methods.dpr.betta'", "did you mean 'beta'"]),
    ("methods.dprr.beta", ("1",),
     ["config.sweep.field='methods.dprr.beta'", "did you mean 'dpr'"]),
    ("methods.dpr", ("1",),
     ["config.sweep.field='methods.dpr' is a section", "such as methods.dpr.label"]),
    ("budget", ("1",), ["config.sweep.field='budget' is a section", "budget.steps"]),
    ("methods.dpr.beta.x", ("1",), ["'beta' is a field, not a section"]),
    ("data.tasks", ("add",), ["config.sweep.field='data.tasks'", "only a number"]),
    ("sweep.field", ("a",), ["'sweep' is not a field to sweep over"]),
    ("methods.dpr.beta", (), ["config.sweep.values is empty"]),
    ("methods.dpr.beta", ("0.5", "much"), ["config.sweep.values: 'much' must be of type float"]),
    ("methods.dpr.steps", ("1.5",),
     ["'1.5' must be of type int", "config.methods.dpr.steps"]),
    ("model.shape.tied_head", ("yes",), ["'yes' must be True or False"]),
    ("methods.dpr.gamma", ("1", "2"),
     ["config.sweep.values: at '2': config.methods.dpr.gamma=2.0", "at most 1"]),
    ("methods.dpr.gamma", ("nan",),
     ["at 'nan': config.methods.dpr.gamma=nan must be a finite number"]),
    ("methods.dpr.returns", ("sometimes",),
     ["at 'sometimes': config.methods.dpr.returns='sometimes'"]),
    ("methods.dpr.beta", ("1", "1.0"), ["'1' and '1.0' are the same value"]),
    ("data.template", ("a/b", "a_b"), ["do not give folders of different names"]),
    ("reference.fraction", ("0.5", "0.3"), ["at '0.3'", "add it to sft.milestones"]),
])
def test_what_cannot_be_swept_is_refused(field, values, named):
  with pytest.raises(UserError) as caught:
    sweep.points(swept(field, *values))
  assert "\n" not in str(caught.value)
  assert all(part in str(caught.value) for part in named), str(caught.value)


def test_values_without_a_field_are_refused():
  with pytest.raises(UserError, match="config.sweep: values are given without field"):
    config_lib.resolve({"sweep": {"values": ["1"]}})


EVERY = ("base", "ref", "sft")
FREE = ("low_temperature", "contrastive", "weight_extrapolation")


def shared(field, *values, **sections):
  return sweep.shared(swept(field, *values, **sections))


def test_over_a_field_of_a_method_all_other_methods_are_shared():
  own = {"contrastive": dataclasses.replace(RunConfig().methods["contrastive"], strength=0.5)}
  # The strength of the training-free baselines is that of dpr.
  assert shared("methods.dpr.gamma", "1") == sweep.Shared(
      True, True, ("low_temperature", "continued_sft"), (*EVERY, "low_temperature", "continued_sft")
  )
  assert "contrastive" in shared("methods.dpr.gamma", "1", methods=own).systems
  assert shared("methods.continued_sft.steps", "1") == sweep.Shared(
      True, True, (*FREE, "dpr"), (*EVERY, *FREE, "dpr")
  )
  assert shared("methods.low_temperature.temperature", "0.5").systems == (
      *EVERY, "contrastive", "weight_extrapolation", "continued_sft", "dpr"
  )


def test_over_a_field_of_the_budget_nothing_that_trains_is_shared():
  # A strength may be read from the last step of a method that trains.
  assert shared("budget.steps", "3") == sweep.Shared(True, True, (), (*EVERY, "low_temperature"))
  assert shared("budget.optimizer.b1", "0.5").methods == ()


def test_over_the_reference_what_reads_it_is_not_shared():
  found = shared("reference.fraction", "0.5", reference=HalfData())
  free = ("low_temperature", "continued_sft")
  assert found == sweep.Shared(True, False, free, ("base", "sft", *free), False)
  assert shared("reference", "midrun", "pretrained") == found
  # The moving average is kept while SFT runs.
  assert shared("reference", "midrun", "ema") == sweep.Shared()
  assert shared("reference.decay", "0.5", "0.9", reference=EMA()) == sweep.Shared()


def test_over_the_evaluation_only_training_is_shared():
  compare = RunConfig().compare
  assert shared("eval.max_new_tokens", "3") == sweep.Shared(True, True, compare, (), False)


def test_over_the_evaluation_what_learns_from_it_is_not_shared():
  compare = ("low_temperature", "continued_sft", "contrastive", "dpr")

  def under(field, value, **fields):
    config = dataclasses.replace(RunConfig(), compare=compare, **fields)
    return sweep.shared(
        dataclasses.replace(config, sweep=SweepSection(field=field, values=(value,)))
    )
  chosen = under("eval.reference_prompts", "3", reference=Selected())
  assert chosen == sweep.Shared(True, False, ("low_temperature", "continued_sft"), (), False)
  judged = {**RunConfig().methods, "dpr": DPR(verifier_weight=0.5)}
  assert under("eval.benchmark", "exact", methods=judged).methods == compare[:-1]
  assert under("eval.max_new_tokens", "3", methods=judged).methods == compare


def test_what_starts_from_a_stage_is_shared_only_with_it():
  compare = ("cleaned_sft", "masked_sft", "after", "continued_sft", "dpr")
  methods = {**RunConfig().methods, "after": DPR(start="masked_sft")}

  def under(field, value):
    return sweep.shared(dataclasses.replace(
        RunConfig(), compare=compare, methods=methods,
        sweep=SweepSection(field=field, values=(value,)))).methods

  assert under("methods.cleaned_sft.folds", "3") == ("continued_sft", "dpr")
  assert under("methods.masked_sft.steps", "3") == ("cleaned_sft", "continued_sft", "dpr")
  assert under("methods.dpr.beta", "2") == compare[:-1]
  assert under("eval.benchmark", "exact") == ("continued_sft", "dpr")


@pytest.mark.parametrize("field,value", [
    ("data.corrupt", "0"), ("sft.steps", "3"), ("sft.optimizer.b1", "0.5"),
    ("model.lora.rank", "2"),
])
def test_over_what_everything_depends_on_nothing_is_shared(field, value):
  assert shared(field, value) == sweep.Shared()


def test_adopting_again_changes_nothing(tmp_path):
  whole, point = Workdir(tmp_path), Workdir(tmp_path / "beta=1")
  for file in ("sft/checkpoints/3", "spin/checkpoints/2", "dpr/checkpoints/2", "reference.json",
               "samples/sft.jsonl", "samples/measures.json", "samples/ref.jsonl",
               "samples/frontier/sft.jsonl", "samples/frontier/ref.jsonl",
               "samples/corruption.jsonl", "samples/heatmap_demos.jsonl"):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file)
  point.path.mkdir()
  what = sweep.Shared(True, True, ("spin",), ("base", "sft"))
  sweep.adopt(what, whole, point)
  assert (point.stage("sft") / "checkpoints" / "3").read_text() == "sft/checkpoints/3"
  assert point.stage("spin").is_symlink() and not point.stage("dpr").exists()
  assert not point.stage("ref").exists()  # There is none to share.
  copies = {str(p.relative_to(point.path)) for p in point.path.rglob("*") if p.is_file()}
  assert {c for c in copies if not c.startswith(("sft/", "spin/"))} == {
      "reference.json", "samples/sft.jsonl", "samples/measures.json", "samples/corruption.jsonl",
      "samples/frontier/sft.jsonl", "checksums.json",
  }
  point.measures_file.write_text("more")
  sweep.adopt(what, whole, point)
  assert point.measures_file.read_text() == "more"
  assert whole.measures_file.read_text() == "samples/measures.json"
  moved = tmp_path.rename(tmp_path.with_name("moved"))  # Links are relative.
  assert (moved / "beta=1" / "sft" / "checkpoints" / "3").exists()


@pytest.mark.parametrize("what,expected", [
    (sweep.Shared(True, False, (), ("sft",), False),
     {"samples/sft.jsonl"}),  # What was measured may be under another reference.
    (sweep.Shared(True, True, (), (), False), {"reference.json"}),
    (sweep.Shared(evaluation=False), set()),
])
def test_what_is_not_shared_is_not_copied(what, expected, tmp_path):
  whole, point = Workdir(tmp_path), Workdir(tmp_path / "fraction=1")
  for file in ("sft.jsonl", "ref.jsonl", "measures.json", "corruption.jsonl"):
    whole.samples.mkdir(exist_ok=True)
    (whole.samples / file).write_text(file)
  whole.reference_file.write_text("{}")
  point.path.mkdir()
  sweep.adopt(what, whole, point)
  found = {str(p.relative_to(point.path)) for p in point.path.rglob("*") if p.is_file()}
  assert found - {"checksums.json"} == expected


def test_a_copy_that_followed_the_links_goes_on(tmp_path):
  """As `cp -rL`, `scp -r` or a zip leave it: the stage of a point is a folder of its own."""
  whole, point = Workdir(tmp_path), Workdir(tmp_path / "beta=1")
  for workdir in (whole, point):
    (workdir.stage("sft") / "checkpoints").mkdir(parents=True)
  sweep.adopt(sweep.Shared(True, True, (), ()), whole, point)
  assert (point.stage("sft") / "checkpoints").is_dir() and not point.stage("sft").is_symlink()


# --- The order in which things happen ------------------------------------------------------------

MADE, FAIL = [], []  # (folder, system) that `Noted` was trained for; where it is interrupted.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noted(TrainedMethod):
  """A method that notes that it was trained, and answers as SFT does."""

  level: float = setting(1.0, "of nothing", low=0)

  def train(self, run, name):
    folder, done = run.workdir.path.name, run.workdir.stage(name)
    if done.exists():
      return
    assert (run.workdir.stage("sft") / "metrics.jsonl").exists()
    if (folder, name) in FAIL:
      raise KeyboardInterrupt
    done.mkdir()
    MADE.append((folder, name, self.level))

  def system(self, run, name):
    return System(name, load=lambda: (run.sft(),), modes=("sampled",))


@pytest.fixture
def run_sweep(tmp_path, tmp_path_factory, monkeypatch):
  """run_sweep(field, *values, seeds=) -> what was trained, in order; a tiny run, without pages."""
  before = jax.config.jax_compilation_cache_dir
  cache = tmp_path_factory.getbasetemp() / "compilations"
  MADE.clear(), FAIL.clear()
  monkeypatch.setattr(pipeline, "write_report", lambda path: None)

  def run(field, *values, seeds=1):
    config = config_lib.debug_config(config_lib.default_config())
    config.model.remat, config.seeds = "none", seeds
    config.sft.steps, config.sft.milestones = 2, (0.5,)
    config.budget.max_new_tokens = config.eval.max_new_tokens = 4
    config.data.tasks, config.data.holdout, config.data.num_demos = ("add",), 8, 100
    config.eval.num_prompts = config.eval.batch_size = 8
    config.eval.frontier_samples = config.eval.corrupted_tokens = config.eval.heatmaps = 0
    config.eval.reference_prompts = 0
    config.methods.swept, config.methods.other = Noted(), Noted(level=5.0)
    config.compare = ("other", "swept")
    config.log.progress = config.log.tensorboard = False
    config.sweep.field, config.sweep.values = field, values
    del MADE[:]
    pipeline.run(config_lib.resolve(config), str(tmp_path / "s"), str(cache))
    return list(MADE)

  yield run
  jax.config.update("jax_compilation_cache_dir", before)


def made_at(path):
  return {p: p.stat().st_mtime_ns for p in path.rglob("*.jsonl")}


def test_an_interrupted_sweep_goes_on_and_shared_stages_run_once_and_first(run_sweep, tmp_path):
  FAIL.append(("level=2", "swept"))
  with pytest.raises(KeyboardInterrupt):
    run_sweep("methods.swept.level", "1", "2")
  assert MADE == [("s", "other", 5.0), ("level=1", "swept", 1.0)]
  before = made_at(tmp_path)
  FAIL.clear()
  assert run_sweep("methods.swept.level", "1", "2") == [("level=2", "swept", 2.0)]
  after = made_at(tmp_path)
  assert {p: after[p] for p in before} == before  # Nothing was made anew.
  for point in ("level=1", "level=2"):
    folder = tmp_path / "s" / point
    assert (folder / "sft").is_symlink() and (folder / "other").is_symlink()
    assert (folder / "report" / "results.json").exists()
  results = json.loads((tmp_path / "s" / "report" / "results.json").read_text())
  assert set(results["systems"]) == {*EVERY, "other"}
  assert [set(p["systems"]) for p in results["sweep"]["points"]] == [{*EVERY, "other", "swept"}] * 2
  with pytest.raises(UserError, match="config.sweep.values"):
    run_sweep("methods.swept.level", "1", "2", "3")


@pytest.mark.slow
def test_every_seed_shares_its_own_sft(run_sweep, tmp_path):
  assert run_sweep("methods.swept.level", "1", "2", seeds=2) == [
      ("seed_0", "other", 5.0), ("level=1", "swept", 1.0), ("level=2", "swept", 2.0),
      ("seed_1", "other", 5.0), ("level=1", "swept", 1.0), ("level=2", "swept", 2.0),
  ]
  for seed in (0, 1):
    point = tmp_path / "s" / f"seed_{seed}" / "level=2"
    assert json.loads((point / "config.json").read_text())["config"]["seed"] == seed
    assert (point / "sft").resolve() == point.parent / "sft"
  results = json.loads((tmp_path / "s" / "report" / "results.json").read_text())
  assert results["sweep"]["points"][0]["systems"]["swept"]["accuracy_sampled"]["n"] == 16


def test_what_is_not_shared_is_trained_at_every_point(run_sweep, tmp_path):
  assert run_sweep("data.corrupt", "0", "0.5") == [
      ("corrupt=0", "other", 5.0), ("corrupt=0", "swept", 1.0),
      ("corrupt=0.5", "other", 5.0), ("corrupt=0.5", "swept", 1.0),
  ]
  assert not (tmp_path / "s" / "sft").exists()
  for point in ("corrupt=0", "corrupt=0.5"):
    assert not (tmp_path / "s" / point / "sft").is_symlink()


def test_nothing_is_written_if_a_point_is_wrong(run_sweep, tmp_path):
  with pytest.raises(UserError, match="config.methods.swept.level"):
    run_sweep("methods.swept.level", "1", "-3")
  assert not (tmp_path / "s").exists() and not MADE


@pytest.mark.parametrize("name,field,count", [
    ("reference_fraction", "reference.fraction", 9), ("beta", "methods.dpr.beta", 5),
    ("gamma", "methods.dpr.gamma", 4), ("reward", "methods.dpr.reward", 3),
    ("temperature", "methods.dpr.temperature", 4), ("returns", "methods.dpr.returns", 3),
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
    assert [p.config.methods["dpr"].gamma for p in found] == [0, 0.9, 0.99, 1]
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
      "--config.sweep.field=methods.dpr.beta", "--config.sweep.values=0.5,2",
  ])
  assert [p.value for p in sweep.points(config)] == ["0.5", "2"]
