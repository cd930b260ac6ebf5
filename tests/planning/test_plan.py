"""The entry point: what it refuses, what it searches, and, where libtpu is there, a whole plan."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpr_jax import cli, plan
from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.planning import plan as plan_lib
from dpr_jax.planning import report, search
from dpr_jax.planning import topologies as topologies_lib
from dpr_jax.planning.programs import planned_model

LLAMA = ["--config=configs/llama31_8b.py"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
  """What the entry point sets for its own process must not reach other tests."""
  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES",
               "TPU_ACCELERATOR_TYPE", "TF_CPP_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL",
               "TPU_MIN_LOG_LEVEL"):
    monkeypatch.setenv(name, os.environ.get(name, "1"))


def _refusal(argv, capsys) -> str:
  with pytest.raises(SystemExit) as stopped:
    cli.run_entry_point(plan.main, argv)
  assert stopped.value.code == 2
  text = capsys.readouterr().err.strip()
  last = text.splitlines()[-1]
  assert last.startswith("error: ") and "Traceback" not in text
  return last


@pytest.mark.parametrize("argv, wanted", [
    ([], "--topology is missing"),
    (["--topology=v9:4x4"], "known: v4:NxNxN, v5e:NxN"),
    (["--topology=v5e"], "v5e:4x4"),
    (["--topology=v5e:2x2x2"], "2 dims"),
    (["--topology=v5p:2x0x2"], "3 dims"),
    (["--topology=v5e:4x4", "--mesh=3,2,2"], "--mesh=3,2,2 does not multiply to the 16 devices"),
    (["--topology=v5e:4x4", "--mesh=-1,-1,2"], "--mesh"),
    (["--topology=v5e:4x4", "--mesh=2,2"], "three integers"),
    (["--topology=v5e:4x4", "--config.sft.batch=2"], "'batch' is not a field"),
    (["--topology=v5e:4x4", "--mesh=1,16,1", "--config.sft.batch_size=63"],
     "config.sft: batch_size / accumulation=63"),
    (["--topology=v5e:4x4", "--mesh=1,16,1", "--config.methods.dpr.batch_size=63"],
     "config.methods.dpr: batch_size / accumulation=63"),
    (["--topology=v5e:4x4", "--methods=dpr,nothing"], "--methods: 'nothing' is not one of"),
    (["--topology=v5e:4x4", "--methods=contrastive"], "--methods: 'contrastive' trains nothing"),
    (["--topology=v5e:4x4", "--config.model.shape.num_heads=8", "--config.sft.batch_size=63"],
     "config.sft.batch_size=63"),
    (["--topology=v5e:4x4", "--config.model.shape.vocab_size=0"], "vocab_size=0"),
    (["--topology=v5e:4x4", "--config.data.row_length=200000"], "config.data.row_length=200000"),
    (["--topology=v5e:4x4", "--mesh=1,4,4", "--exhaustive"], "--mesh=1,4,4 names a mesh"),
    (["--topology=v5e:4x4", "here"], "'here' is not a flag"),
])
def test_what_the_entry_point_refuses(argv, wanted, capsys):
  assert wanted in _refusal([*LLAMA, *argv], capsys)


def test_a_missing_libtpu_is_one_line_that_names_the_extra(monkeypatch, capsys):
  real = importlib.util.find_spec
  absent = lambda name, *args: None if name == "libtpu" else real(name, *args)
  monkeypatch.setattr(importlib.util, "find_spec", absent)
  assert "tpu-plan" in _refusal([*LLAMA, "--topology=v5e:4x4"], capsys)


def test_an_output_that_exists_is_not_overwritten(tmp_path, capsys):
  path = tmp_path / "plan.json"
  path.write_text("mine")
  refusal = _refusal([*LLAMA, "--topology=v5e:4x4", f"--output={path}"], capsys)
  assert str(path) in refusal and path.read_text() == "mine"


def test_a_mesh_may_leave_one_axis_open():
  assert plan.parse_mesh("1,-1,4", 16) == (1, 4, 4)
  assert plan.parse_mesh("2,2,4", 16) == (2, 2, 4)


def test_every_candidate_divides_what_it_splits():
  config, _ = plan.parse([*LLAMA, "--topology=v5e:16x16", "--config.sft.batch_size=128",
                          "--config.budget.batch_size=128", "--config.sft.accumulation=2"])
  cfg = planned_model(config)
  shapes = list(search.candidates(config, cfg, 256))
  assert (1, 8, 32) in shapes and (1, 64, 4) in shapes and (1, 256, 1) not in shapes
  for data, fsdp, tensor in shapes:
    assert data * fsdp * tensor == 256
    assert 64 % (data * fsdp) == 0 and cfg.num_heads % tensor == 0
  assert len(shapes) == len(set(shapes)) > 3


def test_the_search_prefers_what_fits():
  config, _ = plan.parse([*LLAMA, "--topology=v5e:4x4", "--config.sft.accumulation=4",
                          "--config.budget.accumulation=4"])
  topology = topologies_lib.parse_topology("v5e:4x4")
  ranked = search.ranked(config, planned_model(config), topology)
  fits = [e.peak_bytes <= topology.chip.hbm_bytes for e in ranked]
  assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
  times = [e.seconds for e, fit in zip(ranked, fits) if fit]
  assert times == sorted(times)


NAMES = ("sft/train_step", "dpr/rollout_step", "dpr/train_step")
V5E = topologies_lib.parse_topology("v5e:4x4")


def _searched(monkeypatch, rounds, peaks, seconds=None, **kwargs):
  """make_plan with stubs: a round has the guesses {mesh: GiB}; `peaks`: GiB by (round, mesh).

  A program above 15.75 GiB does not fit; one that is None exhausts the compiler. `seconds`: the
  bounds (compute, ici) of each program by mesh.
  """
  at = {n: i for i, n in enumerate((1, 2, 4, 8, 16))}
  compiled = []

  def ranked(config, cfg, topology):
    i = at[config.sft.accumulation]
    guesses = rounds[i].items() if i < len(rounds) else ()
    return [search.Estimate(mesh, gib * 2**30, 1.0) for mesh, gib in guesses]

  def plan_mesh(config, cfg, topology, devices, shape, on_program):
    key = at[config.sft.accumulation], shape
    compiled.append(key)
    programs = {name: report.not_compiled() for name in NAMES}
    for name, gib in zip(NAMES, peaks[key]):
      compute, ici = (seconds or {}).get(shape, (1.0, 0.0))
      programs[name].update(fits=gib is not None and gib < 15.75, resident_bytes=2**30,
                            bound_seconds=None if gib is None else dict(compute=compute, ici=ici),
                            peak_bytes=None if gib is None else gib * 2**30)
    return {"mesh": dict(zip(("data", "fsdp", "tensor"), shape)), "attention": "splash",
            "fits": all(p["fits"] is True for p in programs.values()), "programs": programs,
            "batch": {}, "tokens_per_second_bound": {}}

  monkeypatch.setattr(search, "ranked", ranked)
  monkeypatch.setattr(report, "plan_mesh", plan_mesh)
  monkeypatch.setattr(plan_lib, "describe", lambda topology: ["device"])
  config, _ = plan.parse([*LLAMA, "--topology=v5e:4x4"])
  return plan_lib.make_plan(config, V5E, **kwargs), compiled


A, B = (1, 16, 1), (1, 8, 2)


def test_more_micro_batches_are_tried_until_a_mesh_fits(monkeypatch):
  rounds = [{A: 10, B: 20}, {B: 12, A: 13}, {A: 1}]
  peaks = {(0, A): [10, None], (1, B): [9, 9, 9]}
  made, compiled = _searched(monkeypatch, rounds, peaks)
  assert compiled == [(0, A), (1, B)]
  assert made["fits"] and tuple(made["mesh"].values()) == B
  assert made["accumulation"] == {"config.sft.accumulation": 2, "config.budget.accumulation": 2}
  found = [(c["accumulation"], tuple(c["mesh"].values()), c["fits"]) for c in made["candidates"]]
  assert found == [([1, 1], A, False), ([2, 2], B, True), ([2, 2], A, None)]


def test_micro_batches_of_all_stages_are_multiplied():
  """Of SFT, of the shared budget and of a method with its own, while they divide the rows."""
  config, _ = plan.parse([*LLAMA, "--topology=v5e:4x4", "--methods=dpr,spin",
                          "--config.methods.spin.accumulation=2", "--config.sft.batch_size=96"])
  rounds = [plan_lib.accumulations(how) for how in plan_lib._accumulating(config)]
  names = ["config.sft.accumulation", "config.budget.accumulation",
           "config.methods.spin.accumulation"]
  assert [list(r) for r in rounds] == [names] * 5
  assert [list(r.values()) for r in rounds] == [[n, n, 2 * n] for n in (1, 2, 4, 8, 16)]
  config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, batch_size=12))
  assert len(list(plan_lib._accumulating(config))) == 3


@pytest.mark.parametrize("seconds, best", [
    ({A: (2.0, 1.0), B: (1.0, 1.5)}, B),
    ({A: (2.0, 1.0), B: (2.0, 1.5)}, A),  # The longest are alike.
])
def test_an_exhaustive_search_compiles_all_that_may_fit_and_takes_the_fastest(
    monkeypatch, seconds, best
):
  C, D = (1, 4, 4), (1, 2, 8)
  peaks = {(0, A): [9, 8, 7], (0, B): [6, 6, 6], (0, C): [10, None]}
  made, compiled = _searched(
      monkeypatch, [{C: 8, A: 9, B: 10, D: 30}, {A: 1}], peaks, seconds, exhaustive=True, most=1
  )
  assert compiled == [(0, C), (0, A), (0, B)] and tuple(made["mesh"].values()) == best
  found = {tuple(c["mesh"].values()): (c["fits"], c["peak_bytes"], c["bound_seconds"])
           for c in made["candidates"]}
  assert found == {
      C: (False, None, None), D: (None, None, None),
      A: (True, 10 * 2**30, 3 * max(seconds[A])), B: (True, 7 * 2**30, 3 * max(seconds[B])),
  }


def test_a_round_without_a_mesh_leaves_what_was_found(monkeypatch):
  made, compiled = _searched(monkeypatch, [{A: 10, B: 11}], {(0, A): [None], (0, B): [10, 30]})
  assert compiled == [(0, A), (0, B)]
  # It names the accumulation that was compiled, not of the one that no mesh divides.
  assert made["accumulation"]["config.sft.accumulation"] == 1 and not made["fits"]
  assert tuple(made["mesh"].values()) == B and made["programs"]["sft/train_step"]["fits"]
  assert [c["fits"] for c in made["candidates"]] == [False, False]


def test_a_hopeless_round_leaves_what_was_found(monkeypatch):
  made, compiled = _searched(monkeypatch, [{A: 10}, {B: 40}], {(0, A): [12, None]})
  assert compiled == [(0, A)] and made["accumulation"]["config.sft.accumulation"] == 1
  assert tuple(made["mesh"].values()) == A


def test_where_all_is_hopeless_the_smallest_is_compiled(monkeypatch):
  made, compiled = _searched(monkeypatch, [{A: 50}, {B: 40, A: 45}], {(1, B): [None]})
  assert compiled == [(1, B)] and made["accumulation"]["config.sft.accumulation"] == 2


def test_no_mesh_at_all_is_one_line(monkeypatch):
  with pytest.raises(UserError, match="no mesh over the 16 devices"):
    _searched(monkeypatch, [], {})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_plan_of_a_tiny_config(tmp_path):
  output = tmp_path / "plan.json"
  root = pathlib.Path(plan.__file__).parents[1]
  small = dict(num_layers=2, hidden_size=256, mlp_size=512, num_heads=4, num_kv_heads=4,
               head_dim=64, vocab_size=8192)
  argv = [*LLAMA, "--topology=v5e:2x2", "--mesh=1,4,1", f"--output={output}",
          *(f"--config.model.shape.{name}={n}" for name, n in small.items()),
          "--config.data.row_length=512", "--config.data.prompt_length=128",
          "--config.budget.max_new_tokens=32", "--config.sft.batch_size=8",
          "--config.budget.batch_size=8", "--config.eval.batch_size=8", "--methods=spin,dpr"]
  done = subprocess.run([sys.executable, "-m", "dpr_jax.plan", *argv], cwd=root, text=True,
                        capture_output=True, timeout=900,
                        env={**os.environ, "PYTHONPATH": str(root)})
  assert done.returncode == 0, done.stderr
  made = json.loads(output.read_text())
  assert made["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and made["fits"]
  assert list(made["programs"]) == [
      "sft/train_step", "spin/make_pairs", "spin/train_step", "dpr/rollout_step", "dpr/train_step"]
  head = 2 * 8192 * 256  # bytes of the head in bfloat16.
  for name, p in made["programs"].items():
    assert p["fits"] and 0 < p["peak_bytes"] < 2**30, name
    assert all(s >= 0 for s in p["bound_seconds"].values()) and p["flops"] > 0
    assert p["involuntary_rematerializations"] == 0, name  # None is a log that was not read.
    if name.endswith("train_step"):
      assert p["alias_bytes"] > 0.9 * p["output_bytes"]
    # Neither the embedding nor the head is gathered, and no gradient of one is summed over devices:
    # what moves is that of the layers, 0.6 of a head, and activations. (When they were gathered, it
    # was 3.2 and 1.9 heads.) SPIN passes through the layers twice.
    if name in ("sft/train_step", "dpr/train_step"):
      moved = p["collective_bytes"]
      assert moved.get("all-reduce", 0) < 0.2 * head and moved["all-gather"] < 1.6 * head, name
      assert moved.get("reduce-scatter", 0) < 0.6 * head and moved["all-to-all"] < head, name
  # The weights are gathered before the loop of decoding, not for each token.
  weights = 2 * made["parameters"]
  assert made["programs"]["dpr/rollout_step"]["collective_bytes"]["all-gather"] < 1.5 * weights
  assert list(made["tokens_per_second_bound"]) == ["sft", "spin", "dpr"]
  assert all(speed > 0 for speed in made["tokens_per_second_bound"].values())
  assert made["attention"] == "splash"
  assert "warning" not in done.stdout and "suggested: --config.mesh.data=1" in done.stdout


def test_resolving_the_default_config_needs_a_shape():
  with pytest.raises(UserError, match="vocab_size"):
    planned_model(resolve(default_config()))
