"""An evaluation does not depend on the number of processes, and resumes with another one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpr_jax.weights import save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path, make_model):
  tokenizer = byte_tokenizer()
  model, variables = make_model(1, vocab_size=len(tokenizer), max_length=128)
  save_pretrained(tmp_path / "model", model.cfg, variables["params"], tokenizer=tokenizer)
  return tmp_path / "model"


def run(processes, output, *flags):
  """Evaluates on four devices."""
  done = subprocess.run(
      [ROOT / "launch/local_multiprocess.sh", str(processes), "--", sys.executable, "-m",
       "dpr_jax.evaluate", f"--output={output}", "--mesh=2,2,1", "--batch_size=4", *flags],
      env={**os.environ, "PYTHONPATH": str(ROOT),
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"},
      capture_output=True, text=True, timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_wrote(model, tmp_path):
  flags = [f"--model={model}", "--benchmark=tasks", "--samples=2", "--temperature=1",
           "--max_prompts=20", "--max_new_tokens=6"]
  one, two = tmp_path / "one", tmp_path / "two"
  run(1, one, *flags)
  # Two resume where one was stopped, in the middle of a line.
  whole = (one / "responses.jsonl").read_bytes()
  two.mkdir()
  (two / "config.json").write_bytes((one / "config.json").read_bytes())
  (two / "responses.jsonl").write_bytes(whole[: len(whole) // 2])
  assert run(2, two, *flags).count("tasks: 20 prompts") == 1  # Process 0 alone prints.
  for name in ("config.json", "responses.jsonl", "results.json"):
    assert (two / name).read_bytes() == (one / name).read_bytes(), name


@pytest.mark.parametrize("benchmark", [
    "perplexity", pytest.param("preference", marks=pytest.mark.slow)])
def test_two_processes_score_like_one(model, tmp_path, benchmark):
  data = tmp_path / "data.jsonl"
  records = [{"prompt": "say " + "x" * i, "response": "y" * (i + 1)} for i in range(7)]
  flags = [f"--model={model}", f"--benchmark={benchmark}", f"--data={data}"]
  if benchmark == "preference":
    records = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "z"} for r in records]
    flags.append(f"--benchmark.ref={model}")
  data.write_text("".join(json.dumps(r) + "\n" for r in records))
  figures = []
  for n in (1, 2):
    run(n, tmp_path / str(n), *flags)
    found = json.loads((tmp_path / str(n) / "results.json").read_text())["metrics"]
    figures.append({name: x["mean"] for name, x in found.items()})
  assert figures[1] == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.slow
def test_two_processes_answer_the_harness_like_one(model, tmp_path):
  pytest.importorskip("lm_eval")
  records = [{"q": "abc" * i, "choices": ["a", "bc", "x"], "label": i % 3} for i in range(1, 8)]
  (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  (tmp_path / "tasks").mkdir()
  for name, more in (
      ("choose", "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
                 "metric_list: [{metric: acc}]"),
      ("write", "output_type: generate_until\ndoc_to_target: q\n"
                "generation_kwargs: {until: ['a'], max_gen_toks: 8}\n"
                "metric_list: [{metric: exact_match}]"),
  ):
    (tmp_path / "tasks" / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        f"{{test: {tmp_path}/data.jsonl}}\ntest_split: test\ndoc_to_text: 'Q: {{{{q}}}}'\n{more}\n")
  flags = [f"--model={model}", "--benchmark=lm_eval:choose,write", f"--data={tmp_path}/tasks"]
  found = []
  for n in (1, 2):
    assert run(n, tmp_path / str(n), *flags).count("lm_eval: 14 prompts") == 1
    lines = (tmp_path / str(n) / "responses.jsonl").read_text().splitlines()
    found.append([json.loads(line) for line in lines])
  assert len(found[0]) == 28
  for one, two in zip(*found, strict=True):
    assert one.pop("logp", 0) == pytest.approx(two.pop("logp", 0), abs=1e-4)
    assert one == two
  config = [json.loads((tmp_path / n / "config.json").read_text()) for n in "12"]
  assert config[0] == config[1]


@pytest.mark.slow
def test_two_processes_ask_a_judge_once(model, tmp_path, chat_endpoint):
  endpoint = chat_endpoint(lambda body, number: "[[A]]")
  data = tmp_path / "pairs.jsonl"
  records = [{"prompt": f"ask {i}", "response": "reference"} for i in range(7)]
  data.write_text("".join(json.dumps(r) + "\n" for r in records))
  flags = [f"--model={model}", "--benchmark=lima", f"--data={data}", "--max_new_tokens=6"]
  asking = [f"--judge_url={endpoint.url}", "--judge_model=j"]
  assert run(2, tmp_path / "asked", *flags, *asking).count("lima: 7 prompts") == 1
  assert len(endpoint.asked) == 14 == len({str(body) for body in endpoint.asked})
  scoring = ["--judge=log_ratio", f"--judge.sft={model}"]
  found = []
  for n in (1, 2):
    run(n, tmp_path / str(n), *flags, *scoring)
    lines = (tmp_path / str(n) / "judgments.jsonl").read_text().splitlines()
    found.append({(r["index"], r["part"]): r["reward"] for r in map(json.loads, lines)})
  assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == 14
