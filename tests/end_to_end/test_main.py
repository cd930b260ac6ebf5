"""The main entry_point, from demonstrations to a report."""

import json
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest

from dpr_jax import cli
from dpr_jax import main as main_module
from dpr_jax.config.fields import package_defaults
from dpr_jax.training.metrics import read_metrics

CONFIG = "configs/smoke.py:debug"
STAGES = {"sft": 20, "dpr": 4, "continued_sft": 4}
SYSTEMS = {
    "base", "ref", "sft", "dpr", "continued_sft", "contrastive", "weight_extrapolation",
    "low_temperature",
}


def arrays(workdir: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
  """All arrays of the newest checkpoint of a stage, by their path."""
  import jax
  import orbax.checkpoint as ocp

  folder = workdir / stage / "checkpoints"
  step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  out = {}
  for item in ("variables", "training"):
    tree = ocp.StandardCheckpointer().restore(folder / str(step) / item)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      key = jax.tree_util.keystr(path)
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
      out[f"{item}{key}"] = np.asarray(leaf)
  return out


def test_leaves_everything_behind(finished_run):
  workdir, out, err = finished_run
  results = json.loads((workdir / "report" / "results.json").read_text())
  assert set(results["systems"]) == SYSTEMS
  for name, metrics in results["systems"].items():
    assert metrics["accuracy_sampled"]["n"] == 32, name
    low, high = metrics["accuracy_sampled"]["ci95"]
    assert 0 <= low <= metrics["accuracy_sampled"]["mean"] <= high <= 1
  assert results["seeds"] == [0]
  assert set(results["corruption"]) == {"all", "unique", "varied"}
  found = (workdir / "samples" / "corruption.jsonl").read_text().splitlines()
  assert len(found) == results["corruption"]["all"]["endogenous"]["auc"]["n"] > 28
  pairs = {tuple(c["pair"]) for c in results["comparisons"]}
  others = SYSTEMS - {"base", "ref", "dpr"}
  assert pairs == {("sft", "ref"), *((n, "sft") for n in {*others, "dpr"} - {"sft"}),
                   *(("dpr", n) for n in others)}
  assert results["main"] == "dpr" and set(results["labels"]) == SYSTEMS
  assert all(column in results["columns"] for m in results["systems"].values() for column in m)
  page = (workdir / "report" / "report.html").read_text()
  assert "<script" not in page and "contrastive" in page
  assert list((workdir / "report").glob("*.png"))
  for stage, steps in STAGES.items():
    lines = read_metrics(workdir / stage / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all({"loss", "tokens", "seconds", "learning_rate", "grad_norm"} <= set(x) for x in lines)
  dpr = read_metrics(workdir / "dpr" / "metrics.jsonl")
  assert {"reward", "kl", "response_length", "eos_rate", "entropy", "decode_gap"} <= set(dpr[0])
  # On-policy and exact: what decoding saw is what scoring sees, and the first KL is to itself.
  assert max(line["decode_gap"] for line in dpr) < 1e-4
  assert abs(dpr[0]["kl"]) < 1e-5
  assert "report.html" in out and "Traceback" not in err
  # One program for each kind of system and way to sample, whatever the temperature.
  decoding = re.search(r"evaluate: (\d+) programs of decoding were compiled", err)
  assert decoding and 1 <= int(decoding.group(1)) <= len(SYSTEMS)


def test_config_json_tells_what_was_run(finished_run):
  record = json.loads((finished_run[0] / "config.json").read_text())
  assert record["config"]["sft"]["steps"] == STAGES["sft"]
  assert record["model"]["source"] == "random" and record["model"]["num_params"] > 0
  assert {"jax", "flax", "python"} <= set(record["versions"])
  assert record["data"]["heldout"] == 32


def test_a_finished_run_returns_at_once(entry_point, finished_run):
  workdir = finished_run[0]
  before = {p: p.stat().st_mtime_ns for p in (workdir / "samples").iterdir()}
  entry_point.finish(entry_point.start(workdir))
  assert {p: p.stat().st_mtime_ns for p in (workdir / "samples").iterdir()} == before


def test_a_damaged_run_is_made_whole_by_the_same_command(entry_point, finished_run, tmp_path):
  """The last checkpoint of SFT, whose responses were cut, and a table of figures."""
  whole, damaged = finished_run[0], tmp_path / "damaged"
  shutil.copytree(whole, damaged)
  for file in (damaged / "sft" / "checkpoints" / "20" / "variables").rglob("d/*"):
    file.write_bytes(bytes(x ^ 1 for x in file.read_bytes()))
  responses, measures = (damaged / "samples" / name for name in ("sft.jsonl", "measures.json"))
  responses.write_bytes(responses.read_bytes()[:-100])
  measures.write_text(measures.read_text().replace("heldout_nll", "heldout_nil"))
  page = damaged / "report" / "report.html"
  page.write_text("")
  err = entry_point.finish(entry_point.start(damaged))[1]
  assert page.stat().st_size > 10_000
  for name in ("20.damaged", "sft.jsonl.damaged", "measures.json.damaged"):
    assert len(re.findall(rf"renamed to {name}", err)) == 1, err
  assert "Traceback" not in err
  for name in ("sft.jsonl", "dpr.jsonl", "measures.json"):
    files = [w / "samples" / name for w in (whole, damaged)]
    assert files[0].read_bytes() == files[1].read_bytes(), name
  a, b = arrays(whole, "sft"), arrays(damaged, "sft")
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)
  results = [json.loads((w / "report" / "results.json").read_text()) for w in (whole, damaged)]
  assert results[0]["systems"] == results[1]["systems"]


def kill_when(entry_point, workdir, condition, timeout=300):
  """Starts the run and ends it with SIGKILL as soon as `condition` holds."""
  process = entry_point.start(workdir)
  start = time.monotonic()
  while not condition():
    assert process.poll() is None, process.communicate()[1][-2000:]
    assert time.monotonic() - start < timeout
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()


def test_killed_runs_go_on_to_the_same_result(entry_point, finished_run, tmp_path):
  whole, resumed = finished_run[0], tmp_path / "resumed"
  kill_when(entry_point, resumed, lambda: (resumed / "sft" / "checkpoints" / "10").exists())
  kill_when(entry_point, resumed, lambda: (resumed / "dpr" / "metrics.jsonl").exists())
  kill_when(entry_point, resumed, lambda: (resumed / "samples" / "ref.jsonl").exists())
  entry_point.finish(entry_point.start(resumed))
  for stage, steps in STAGES.items():
    a, b = arrays(whole, stage), arrays(resumed, stage)
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=f"{stage}/{key}")
    lines = [read_metrics(w / stage / "metrics.jsonl") for w in (whole, resumed)]
    assert [x["step"] for x in lines[1]] == list(range(1, steps + 1))
    for x, y in zip(*lines):
      assert {k: v for k, v in x.items() if k != "seconds"} == {
          k: v for k, v in y.items() if k != "seconds"
      }
  results = [json.loads((w / "report" / "results.json").read_text()) for w in (whole, resumed)]
  assert results[0]["systems"] == results[1]["systems"]
  assert results[0]["comparisons"] == results[1]["comparisons"]


@pytest.mark.slow
def test_seeds_are_aggregated(entry_point, tmp_path):
  entry_point.finish(entry_point.start(tmp_path / "seeds", "--config.seeds=2"))
  results = json.loads((tmp_path / "seeds" / "report" / "results.json").read_text())
  assert results["seeds"] == [0, 1]
  assert results["systems"]["dpr"]["accuracy_sampled"]["n"] == 64
  assert (tmp_path / "seeds" / "seed_1" / "report" / "report.html").exists()
  assert "seed_1/report/report.html" in (tmp_path / "seeds" / "report" / "report.html").read_text()


FAMILIES = (
    "llama32_1b", "llama31_8b", "qwen25_7b", "mistral_7b", "gemma3_4b", "gemma3_270m",
    "smollm2_135m",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_config_runs_at_debug_size(entry_point, tmp_path, name):
  entry_point.finish(entry_point.start(tmp_path / name, config=f"configs/{name}.py:debug"))
  dpr = read_metrics(tmp_path / name / "dpr" / "metrics.jsonl")
  assert max(line["decode_gap"] for line in dpr) < 1e-4 and abs(dpr[0]["kl"]) < 1e-5
  assert (tmp_path / name / "report" / "report.html").exists()


@pytest.mark.slow
def test_a_reference_of_half_of_the_data(entry_point, tmp_path):
  entry_point.finish(entry_point.start(tmp_path / "half", "--config.reference.kind=half_data"))
  assert len(read_metrics(tmp_path / "half" / "ref" / "metrics.jsonl")) == STAGES["sft"] // 2
  results = json.loads((tmp_path / "half" / "report" / "results.json").read_text())
  assert set(results["systems"]) == SYSTEMS


@pytest.mark.slow
def test_every_method_trains_and_is_compared(entry_point, tmp_path):
  """With one in two versions, of which the second has a budget of its own."""
  workdir, methods = tmp_path / "all", package_defaults("dpr_jax.methods")
  names = ["short", *(name for name in methods if name != "dpr"), "dpr"]
  flags = ["--config.methods.short.kind=dpr", "--config.methods.short.steps=2",
           f"--config.compare={','.join(names)}"]
  entry_point.finish(entry_point.start(workdir, *flags))
  results = json.loads((workdir / "report" / "results.json").read_text())
  assert set(results["systems"]) == {"base", "ref", "sft", *names}
  pairs = {tuple(c["pair"]) for c in results["comparisons"]}
  assert all(("dpr", name) in pairs for name in names[:-1])
  tokens = {}
  for name in names:
    if name in methods and not methods[name].trained:
      assert not (workdir / name).exists()
      continue
    lines = read_metrics(workdir / name / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4][: 2 if name == "short" else 4]
    tokens[name] = lines[-1]["tokens"]
  assert results["stages"]["short"]["own_budget"] == "steps 2"
  assert "own_budget" not in results["stages"]["dpr"]
  # Rollouts of a model that has learnt little are long; what trains on them has as many tokens.
  for name in ("sentence_level", "endogenous", "log_likelihood"):
    assert 0.5 < tokens[name] / tokens["dpr"] < 2
  # At SFT itself both log-ratios are 0: the logistic losses start at log 2 and 2 log 2.
  spin, gsil = (read_metrics(workdir / n / "metrics.jsonl")[0]["loss"] for n in ("spin", "gsil"))
  assert spin == pytest.approx(np.log(2), abs=1e-4)
  assert gsil == pytest.approx(2 * np.log(2), abs=1e-4)


# --- Bad input: one line that names the place, exit code 2, nothing overwritten -------------------

GOOD = '{"prompt": "hi", "response": "hello"}'


# Case -> (flags, what the line must say). {dir} is a folder with the files of FILES.
FILES = {
    "malformed.jsonl": GOOD + "\n{oops",
    "unknown.jsonl": '{"q": "x"}',
    "empty.jsonl": GOOD.replace("hello", ""),
    "many.jsonl": "\n".join(f'{{"prompt": "p{i}", "response": "r{i}"}}' for i in range(300)),
}
BAD_INPUTS = {
    "missing file": (["--config.data.demos=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    "malformed line": (
        ["--config.data.demos={dir}/malformed.jsonl"], ["malformed.jsonl:2", "malformed JSON"]
    ),
    "unknown format": (
        ["--config.data.demos={dir}/unknown.jsonl"], ["unknown.jsonl:1", "no known format"]
    ),
    "format field": (["--config.data.format=csv"], ["config.data.format", "'csv'"]),
    "empty response": (
        ["--config.data.demos={dir}/empty.jsonl"], ["empty.jsonl:1", "empty response"]
    ),
    "prompt beyond the budget": (
        ["--config.data.demos={dir}/many.jsonl", "--config.data.prompt_length=3"],
        ["config.data: ", "many.jsonl:1", "prompt_length=3"],
    ),
    "unknown field": (["--config.sft.stepz=3"], ["--config.sft.stepz", "did you mean 'steps'"]),
    "wrong type": (["--config.sft.steps=many"], ["--config.sft.steps"]),
    "out of range": (
        ["--config.methods.dpr.gamma=2.0"], ["config.methods.dpr.gamma=2.0", "at most 1"]
    ),
    "reference without milestone": (
        ["--config.reference.fraction=0.33"], ["config.reference: fraction=0.33", "milestones"]
    ),
    "row beyond the model": (
        ["--config.data.row_length=4096"], ["config.data.row_length=4096", "256 tokens"]
    ),
    "missing weights": (["--config.model.pretrained=nowhere.gguf"], ["nowhere.gguf"]),
    "mesh": (["--config.mesh.tensor=3"], ["config.mesh", "devices"]),
    "shape": (["--config.model.shape.num_kv_heads=3"], ["config.model.shape", "num_kv_heads=3"]),
    "sweep": (
        ["--config.sweep.field=methods.dpr.gamma", "--config.sweep.values=1,2"],
        ["config.sweep.values: at '2'", "config.methods.dpr.gamma=2.0", "at most 1"],
    ),
    "unknown kind": (
        ["--config.reference.kind=early"], ["--config.reference.kind='early'", "midrun"]
    ),
    "unknown method": (["--config.compare=dpr,drp"], ["config.compare: 'drp'", "spin"]),
    "flag": (["--confg.sft.steps=3"], ["confg.sft.steps"]),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(case, entry_point, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(entry_point.root)
  workdir = tmp_path / "run"
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  flags, expected = BAD_INPUTS[case]
  flags = [flag.replace("{dir}", str(tmp_path)) for flag in flags]
  if any(flag.startswith("--config.data.demos=") for flag in flags):
    flags += ["--config.data.corrupt=0", "--config.data.tasks=()"]  # Of the built-in tasks.
  argv = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.log.progress=False", *flags]
  with pytest.raises(SystemExit) as exit_info:
    cli.run_entry_point(main_module.main, argv)
  assert exit_info.value.code == 2
  error = capsys.readouterr().err.strip()
  assert error.count("\n") == 0, error
  assert all(part in error for part in expected), error
  assert not workdir.exists()


def test_workdir_of_another_config_is_left_alone(entry_point, finished_run, capsys, monkeypatch):
  monkeypatch.chdir(entry_point.root)
  workdir = finished_run[0]
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  argv = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.log.progress=False"]
  with pytest.raises(SystemExit) as exit_info:
    cli.run_entry_point(main_module.main, [*argv, "--config.sft.steps=30"])
  assert exit_info.value.code == 2
  error = capsys.readouterr().err
  assert "config.sft.steps: 20 there, 30 here" in error
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(entry_point, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(entry_point.root)
  (tmp_path / "thesis.tex").write_text("do not lose me")
  with pytest.raises(SystemExit) as exit_info:
    cli.run_entry_point(main_module.main, [f"--config={CONFIG}", f"--workdir={tmp_path}"])
  assert exit_info.value.code == 2
  assert "thesis.tex" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
