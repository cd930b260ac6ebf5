"""score, generate and export on the stages of a run."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from dpr_jax import cli, export, generate, score


def call(module, *argv):
  cli.run_entry_point(module.main, [str(a) for a in argv])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "prompts.jsonl"
  records = [
      {"prompt": f"upper {w}", "response": w.upper(), "id": i}
      for i, w in enumerate(("rose", "tulip", "oak"))
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def test_generate_then_score(finished_run, prompts, tmp_path):
  workdir = finished_run[0]
  responses, scored = tmp_path / "responses.jsonl", tmp_path / "scored.jsonl"
  call(generate, f"--model={workdir}/dpr", f"--input={prompts}", f"--output={responses}",
       "--max_new_tokens=12", "--samples=2", "--seed=3")
  generated = lines(responses)
  assert [r["id"] for r in generated] == [0, 0, 1, 1, 2, 2]
  assert all(1 <= r["length"] <= 12 and isinstance(r["hit_eos"], bool) for r in generated)
  with open(responses, "w") as file:  # An untrained model may answer with nothing; that is no text.
    file.writelines(json.dumps({**r, "response": r["response"] or "x"}) + "\n" for r in generated)
  call(score, f"--sft={workdir}/sft", f"--ref={workdir}/sft@0.5", f"--input={responses}",
       f"--output={scored}", f"--html={tmp_path}/page.html")
  for record, given in zip(lines(scored), lines(responses), strict=True):
    assert {k: record[k] for k in given} == given
    n = len(record["tokens"])
    assert n == len(record["token_rewards"]) == len(record["logp_sft"]) == len(record["logp_ref"])
    # What ran out of tokens has no end.
    assert (record["tokens"][-1] == "<|end|>") == record["hit_eos"]
    np.testing.assert_allclose(
        record["token_rewards"], np.subtract(record["logp_sft"], record["logp_ref"]), atol=2e-6
    )
    assert math.isclose(record["reward"], sum(record["token_rewards"]), abs_tol=1e-5)
  assert "<script" not in (tmp_path / "page.html").read_text()


def test_a_stop_string_ends_a_response(finished_run, prompts, tmp_path):
  given = [f"--model={finished_run[0]}/dpr", f"--input={prompts}", "--max_new_tokens=12",
           "--samples=4", "--seed=3"]
  call(generate, *given, f"--output={tmp_path}/free.jsonl")
  free = lines(tmp_path / "free.jsonl")
  # Two characters that a response has, whatever a model that has hardly learnt writes else.
  stop = next(m[0] for r in free if (m := re.search(r"(?<!<)[a-zA-Z0-9 ]{2}", r["response"])))
  call(generate, *given, f"--output={tmp_path}/out.jsonl", f"--stop={stop}", "--stop=never")
  for record, whole in zip(lines(tmp_path / "out.jsonl"), free, strict=True):
    before, found, _ = whole["response"].partition(stop)
    assert record["response"] == before
    assert record["hit_eos"] == (bool(found) or whole["hit_eos"])
    if found and not any(s in before + stop for s in ("\ufffd", "<|")):  # A token per byte.
      assert record["length"] == len((before + stop).encode())


def test_ref_equal_to_sft_scores_zero(finished_run, tmp_path):
  workdir, source, scored = finished_run[0], tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text('{"messages": [{"role": "user", "content": "sort ba"},'
                    ' {"role": "assistant", "content": "ab"}]}\n')
  call(score, f"--sft={workdir}/sft", f"--ref={workdir}/sft", f"--input={source}",
       f"--output={scored}")
  assert lines(scored)[0]["token_rewards"] == [0.0, 0.0, 0.0]
  assert lines(scored)[0]["logp_sft"][0] < 0


def test_a_run_of_another_platform_is_read_here(finished_run, tmp_path):
  workdir, elsewhere, scored = finished_run[0], tmp_path / "gpu", tmp_path / "out.jsonl"
  shutil.copytree(workdir, elsewhere)
  record = json.loads((elsewhere / "config.json").read_text())
  record["model"]["config"]["attention"] = record["config"]["model"]["attention"] = "cudnn"
  (elsewhere / "config.json").write_text(json.dumps(record))
  source = tmp_path / "in.jsonl"
  source.write_text('{"prompt": "sort ba", "response": "ab"}\n')
  call(score, f"--sft={elsewhere}/sft", f"--ref={workdir}/sft", f"--input={source}",
       f"--output={scored}")
  assert lines(scored)[0]["reward"] == 0.0


def test_export_is_the_same_model(finished_run, prompts, tmp_path):
  """The exported folder is itself a CKPT, and answers greedily as the stage does."""
  workdir, folder = finished_run[0], tmp_path / "hf"
  call(export, f"--model={workdir}/sft", f"--output={folder}")
  answers = []
  for name, model in (("a", f"{workdir}/sft"), ("b", folder)):
    call(generate, f"--model={model}", f"--input={prompts}", f"--output={tmp_path}/{name}.jsonl",
         "--temperature=0", "--max_new_tokens=10")
    answers.append(lines(tmp_path / f"{name}.jsonl"))
  assert answers[0] == answers[1]


BAD = {
    "no such stage": (score, ["--sft={run}/nothing", "--ref={run}/sft"], "no such checkpoint"),
    "no such milestone": (score, ["--sft={run}/sft", "--ref={run}/sft@0.33"], "0.33"),
    "not a fraction": (score, ["--sft={run}/sft", "--ref={run}/sft@half"], "fraction in (0, 1]"),
    "output exists": (generate, ["--model={run}/sft", "--output={input}"], "exists already"),
    "input missing": (generate, ["--model={run}/sft", "--input=nowhere.jsonl"], "no such file"),
    "sampling": (generate, ["--model={run}/sft", "--top_p=2"], "top_p"),
    "empty stop": (generate, ["--model={run}/sft", "--stop="], "--stop: stop string '' is empty"),
    "too long": (generate, ["--model={run}/sft", "--max_new_tokens=5000"], "--max_new_tokens=5000"),
    "mesh": (generate, ["--model={run}/sft", "--mesh=2,x"], "--mesh=2,x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, finished_run, prompts, tmp_path, capsys):
  module, flags, expected = BAD[case]
  given = {"--input": f"--input={prompts}", "--output": f"--output={tmp_path}/out.jsonl"}
  for flag in flags:
    flag = flag.replace("{run}", str(finished_run[0])).replace("{input}", str(prompts))
    given[flag.partition("=")[0]] = flag
  with pytest.raises(SystemExit) as exit_info:
    call(module, *given.values())
  assert exit_info.value.code == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert expected in error
  assert not (tmp_path / "out.jsonl").exists()
