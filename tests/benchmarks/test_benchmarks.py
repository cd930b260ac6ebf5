"""Every benchmark prints one JSON line with the documented fields."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import closed_form, overhead
from dpr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
COMMON = {
    "benchmark", "model", "shape", "dtype", "devices", "repeats", "seconds", "seconds_all",
    "tokens_per_s", "peak_bytes", "peak_of", "compile_seconds", "peak_rates", "mfu",
    "roofline_seconds", "peers", "load_average", "versions",
}


@pytest.mark.parametrize("name", [
  "sft_step", "score", "rollout", pytest.param("dpr_step", marks=pytest.mark.slow)
])
def test_prints_the_documented_fields(lines, name):
  line = lines(name)
  assert COMMON <= set(line)
  assert line["benchmark"] == name and line["repeats"] == 2
  assert line["peak_rates"]["flops_per_s"] > 0 and line["peak_rates"]["bytes_per_s"] > 0
  assert line["seconds"] == np.median(line["seconds_all"]) and line["peak_bytes"] > 2**20
  tokens = {"sft_step": 24, "score": 24, "rollout": 32}.get(name)
  if tokens:
    np.testing.assert_allclose(line["tokens_per_s"] * line["seconds"], tokens, rtol=1e-6)


def test_a_peer_runs_in_its_own_process(lines):
  peer = lines("score")["peers"]["torch"]
  if "unavailable" in peer:
    assert "torch" in peer["unavailable"]
    pytest.skip(peer["unavailable"])
  assert peer["ratio"] == pytest.approx(peer["seconds"] / peer["ours_seconds"])
  assert len(peer["seconds_all"]) == 2 and peer["peak_bytes"] > 2**20
  assert "torch" in peer["versions"]


def test_rollout_counts_steps_and_tokens(lines):
  line = lines("rollout")
  skewed = line["skewed"]
  # The responses do not depend on how they are batched.
  assert skewed["plain"]["tokens"] == skewed["refilled"]["tokens"] == skewed["wide"]["tokens"]
  assert skewed["wide"]["steps"] == skewed["wide"]["longest"] - 1
  assert skewed["refilled"]["longest"] <= 8 and skewed["refilled"]["steps"] >= 1
  assert line["shared_prefill"]["samples"] == 2 and line["shared_prefill"]["shared_seconds"] > 0


@pytest.mark.slow
def test_dpr_step_samples_and_leaves_one_trick_out_at_a_time(lines):
  line = lines("dpr_step")
  assert 4 <= line["sampled_tokens"] <= 32 and 1 <= line["longest"] <= 8
  np.testing.assert_allclose(line["tokens_per_s"] * line["seconds"], line["sampled_tokens"],
                             rtol=1e-6)
  assert set(line["shares"]) == {"decode", "score", "backward"}
  assert sum(line["shares"].values()) == pytest.approx(1.0)
  tricks = {"no_refill", "own_prefill", "rescored", "no_chunks"}
  assert set(line["without"]) == set(line["predicted_gain"]) == tricks


@pytest.mark.slow
def test_both_gradients_are_timed_in_turn(run_benchmark):
  record, _ = run_benchmark(
      "dpr_step", "--batch=4", "--prompt=4", "--new=8", "--samples=2", "--slots=2", "--skew=3",
      "--variants=gradients", "--in_process",
  )
  found = record["gradients"]
  assert found["sampled"] == record["seconds"] and found["exact"] > 0
  assert found["ratio"] == pytest.approx(found["exact"] / found["sampled"])


def test_the_exact_gradient_nears_the_closed_form(capsys):
  closed_form.main([
      "--rows=32", "--steps=60", "--every=30", "--instances=1", "--prompts=2", "--vocab_size=4",
      "--max_length=3", "--learning_rate=0.1",
  ])
  record = json.loads(capsys.readouterr().out)
  assert record["checkpoints"] == [0, 30, 60]
  curves = record["total_variation"]
  assert len({curve[0] for curve in curves.values()}) == 1
  for curve in curves.values():
    assert curve[2] < 0.7 * curve[0]
  assert max(curves["exact"][2], curves["forward"][2]) < 0.5 * curves["sampled"][2]


@pytest.mark.slow
def test_evaluation_is_compared_response_by_response(run_benchmark, tmp_path):
  from benchmarks import render

  data = tmp_path / "data.jsonl"
  problems = [{"question": f"say {'x' * i}", "answer": "#### 1"} for i in range(3)]
  data.write_text("".join(json.dumps(p) + "\n" for p in problems))
  record, text = run_benchmark(
      "evaluate_speed", f"--data={data}", "--prompts=3", "--new=4", "--batch=2", "--peer=lm_eval",
      f"--peer_python={sys.executable}",
  )
  assert json.loads(text) == json.loads(json.dumps(record)) and text.count("\n") == 1
  assert record["responses_per_s"] * record["seconds"] == pytest.approx(3)
  assert 3 <= record["tokens"] <= 12 and "dpr_jax" in render.evaluate(record)
  peer = record["peers"]["lm_eval"]
  if "unavailable" in peer:
    pytest.skip(peer["unavailable"])
  assert peer["prompts_equal"] == 1 and 0 <= peer["texts_equal"] <= 1
  assert peer["ratio"] == pytest.approx(peer["seconds"] / peer["ours_seconds"])


def test_memory_tells_whether_all_logits_live(lines):
  chunked, whole = lines("memory")["cases"]
  assert chunked["chunk_columns"] == 4 and not chunked["btv_live"]
  assert whole["btv_live"] and whole["largest_logits_bytes"] > chunked["largest_logits_bytes"]
  rows, columns, vocab = 2, 16, chunked["vocab_size"]
  assert chunked["logits_bytes"] == 4 * rows * columns * vocab
  # 15 scored columns in even chunks of at most 4.
  assert chunked["largest_logits_bytes"] == 4 * rows * 4 * vocab


@pytest.mark.slow
def test_scaling_partitions(lines):
  (run,) = lines("scaling")["runs"]
  assert run["devices"] == 2 and run["tokens_per_s"] > 0
  assert run["collectives"].get("all-gather", 0) > 0  # fsdp gathers what it has split.


@pytest.mark.slow
def test_tables_are_filled(lines):
  from benchmarks import render

  page = (ROOT / "docs" / "performance.md").read_text()
  names = re.findall(r"<!-- table:(\w+) -->", page)
  on_cpu = [n for n in names if not n.endswith("_gpu")]
  assert set(on_cpu) == set(render.TABLES) and len(names) == len(set(names))
  records = [lines(n) for n in ("sft_step", "score", "rollout", "dpr_step", "memory", "scaling")]
  filled = render.render(page, records)
  bodies = dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)\n<!-- /table -->", filled, re.DOTALL))
  assert "| dpr_jax |" in bodies["sft_step"] and "| torch" in bodies["score"]
  assert "| refilled |" in bodies["skewed"] and "| score | " in bodies["memory"]
  # A GPU's lines go to tables of their own.
  on_gpu = [records[1] | {"devices": {**records[1]["devices"], "platform": "gpu"}}]
  own = render.render("<!-- table:score -->\n<!-- /table -->\n"
                      "<!-- table:score_gpu -->\n<!-- /table -->", on_gpu)
  assert own.startswith("<!-- table:score -->\n<!-- /table -->\n") and "| dpr_jax |" in own
  # Filling twice is filling once; tables without a record stay as they were.
  assert render.render(filled, records) == filled
  original = dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)\n<!-- /table -->", page, re.DOTALL))
  for name in ("memory_gemma", "sft_step_full"):
    assert bodies[name] == original[name]
  with pytest.raises(UserError, match="table:nonsense"):
    render.render("<!-- table:nonsense -->\n<!-- /table -->", records)


@pytest.mark.parametrize("name, flags, message", [
    ("score", ["--peer=trl"], "--peer=trl is not one of torch, tunix, none"),
    ("score", ["--peer_python=/nowhere/python"], "is not a program"),
    ("score", ["--repeats=0"], "--repeats=0 must be at least 1"),
    ("rollout", ["--skew=3", "--skew_rows=5"], "--skew_rows=5 is not a multiple of --slots"),
    ("dpr_step", ["--batch=6", "--samples=4"], "--batch=6 is not a multiple of --samples=4"),
    ("memory", ["--lengths=a"], "--lengths=a must be whole numbers"),
    ("memory", ["--what=nothing"], "--what=nothing is not one of sft, score, dpr"),
    ("scaling", ["--devices=0,2"], "--devices=0,2 must be whole numbers"),
    ("score", ["--config=configs/none.py", "--in_process"], "configs/none.py: no such file"),
])
def test_bad_flags_are_named(run_benchmark, name, flags, message):
  with pytest.raises(UserError, match=re.escape(message)):
    run_benchmark(name, *flags)


def test_driver_flags_are_not_passed_on():
  from benchmarks.rounds import strip_peers

  argv = ["--batch=2", "--peer", "torch", "--peer=trl", "--peer_python", "a=b", "--sequential",
          "--length", "3"]
  assert strip_peers(argv) == ["--batch=2", "--length", "3"]


def test_results_of_another_kind_are_refused(tmp_path):
  from benchmarks import render

  (tmp_path / "results.jsonl").write_text(json.dumps({"benchmark": "score"}) + "\nnot json\n")
  with pytest.raises(UserError, match="results.jsonl:2"):
    render.read(tmp_path / "results.jsonl")


@pytest.mark.parametrize("accelerator", [False, True])
def test_run_all_gives_flags_that_the_scripts_take(tmp_path, accelerator):
  from benchmarks import common, rounds

  # Stands for Python: writes down what it was called with.
  fake = tmp_path / "python"
  fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
  fake.chmod(0o755)
  environment = {"PATH": os.environ["PATH"], "PYTHON": str(fake), "PEER_PYTHON": sys.executable,
                 "TUNIX_PYTHON": sys.executable, "REPEATS": "7",
                 **({"ACCELERATOR": "1"} if accelerator else {"MODEL": "some.gguf"})}
  results = tmp_path / "results.jsonl"
  script = ROOT / "benchmarks" / "run_all.sh"
  subprocess.run([script, results], env=environment, check=True, capture_output=True, cwd=tmp_path)
  called = [json.loads(line) for line in results.read_text().splitlines()]
  names = [words[1].removeprefix("benchmarks.") for words in called]
  of_the_host = set() if accelerator else {"memory", "scaling"}
  of_the_host |= set() if accelerator else {"evaluate_speed"}  # It needs a MODEL.
  assert set(names) == {"sft_step", "score", "rollout", "dpr_step"} | of_the_host
  for name, words in zip(names, called, strict=True):
    module = importlib.import_module(f"benchmarks.{name}")
    args = common.parse(module.flags(), words[2:])
    gemma = "gemma" in args.config
    assert args.model == ("" if gemma or accelerator else "some.gguf")
    if accelerator:
      assert args.dtype == "bfloat16" and rounds.peer_shape(args)["num_hidden_layers"] == 16
    getattr(module, "check", lambda args: None)(args)
    assert args.repeats == (1 if name == "memory" else 7)
    if name == "sft_step":
      assert set(args.peers) == {"torch", "trl", "tunix"}
    if name == "memory":
      assert [module.command(args, case) for case in module.cases(args)]


@pytest.mark.slow
def test_overhead_is_a_share_of_a_step(capsys):
  overhead.main(["--config=configs/smoke.py:debug", "--batch=2", "--length=16", "--repeats=2",
                 "--every=4"])
  line = json.loads(capsys.readouterr().out)
  seconds = line["seconds"]
  parts = {kind: sum(t for name, t in seconds.items() if name.startswith(f"{kind}/"))
           for kind in ("each_step", "each_checkpoint", "once")}
  share = (parts["each_step"] + parts["each_checkpoint"] / 4) / line["step_seconds"]
  assert line["share_of_step"] == pytest.approx(share) and min(seconds.values()) > 0
  assert line["once_in_steps"] == pytest.approx(parts["once"] / line["step_seconds"])
