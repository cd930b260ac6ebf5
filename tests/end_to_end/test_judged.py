"""python -m dpr_jax.evaluate with a judge: an endpoint on loopback, a reward model, a class."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import string
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dpr_jax import cli, evaluate, fingerprints
from dpr_jax.evaluation.judging import _read
from dpr_jax.evaluation.responses import Responder
from dpr_jax.weights import load_tokenizer, save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import read_lines


def call(*argv):
  cli.run_entry_point(evaluate.main, [str(a) for a in argv])


def results(folder):
  return json.loads((folder / "results.json").read_text())


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def model(tmp_path, make_model):
  tokenizer = byte_tokenizer()
  model, variables = make_model(1, vocab_size=len(tokenizer), max_length=160)
  save_pretrained(tmp_path / "model", model.cfg, variables["params"], tokenizer=tokenizer)
  return tmp_path / "model"


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


@pytest.fixture
def given(model, tmp_path):
  """given(name, n) -> the flags of an evaluation of n prompts."""

  def flags(name, n=6):
    data = write(tmp_path / "pairs.jsonl",
                 [{"prompt": f"ask {i}", "response": "reference " * (1 + i)} for i in range(n)])
    return [f"--model={model}", f"--benchmark={name}", f"--data={data}", "--max_new_tokens=6",
            "--batch_size=4", "--judge.backoff=0.01"]

  return flags


def content(body):
  return body["messages"][-1]["content"]


def test_an_endpoint_judges_by_logprobs_and_nothing_is_asked_twice(
    given, tmp_path, chat_endpoint, capsys
):
  def reply(body, number):
    top = [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2.4}]
    token = {"token": "m", "logprob": -0.1, "top_logprobs": top}
    return 200, {"choices": [{"message": {"content": "m"}, "logprobs": {"content": [token]}}],
                 "usage": {"prompt_tokens": 50, "completion_tokens": 1}}

  endpoint, out = chat_endpoint(reply), tmp_path / "out"
  flags = [*given("alpaca_eval"), f"--output={out}", f"--judge_url={endpoint.url}"]
  call(*flags, "--judge_model=strict")
  assert len(endpoint.asked) == 12
  assert {b["max_tokens"] for b in endpoint.asked} == {1}
  found = results(out)
  metrics = {name: figure["mean"] for name, figure in found["metrics"].items()}
  assert metrics["win_rate"] == pytest.approx(0.5)  # Whichever is first: both orders.
  judged = [line["scores"]["win_rate"] for line in read_lines(out / "judged.jsonl")]
  assert len(judged) == 6 and np.mean(judged) == pytest.approx(metrics["win_rate"])
  assert metrics["position_consistency"] == 0 and metrics["unparsable"] == 0
  assert metrics["pairs"] == 6 and metrics["judgments"] == 12 and metrics["length"] > 0
  assert metrics["judge_tokens_in"] == 600 and metrics["judge_tokens_out"] == 12
  assert found["columns"]["win_rate"]["label"] == "Win rate"
  assert found["judge"]["kind"] == "endpoint" and found["judge"]["model"] == "strict"
  assert "{answer_b}" in found["judge"]["prompts"]["alpaca_eval"]["template"]
  assert "Length-controlled win rate, minimal model" in capsys.readouterr().out
  before = (out / "results.json").read_bytes()
  call(*flags, "--judge_model=strict")
  assert len(endpoint.asked) == 12 and (out / "results.json").read_bytes() == before
  # Another judge of the same responses.
  responses = (out / "responses.jsonl").read_bytes()
  call(*flags, "--judge_model=lenient")
  assert len(endpoint.asked) == 24 and (out / "responses.jsonl").read_bytes() == responses
  assert results(out)["judge"]["model"] == "lenient"


@pytest.mark.parametrize(("sizes", "how"), [
    ((4,), []), pytest.param((2, 4), ["--samples=2", "--temperature=1"], marks=pytest.mark.slow),
], ids=["greedy", "sampled"])
def test_a_second_turn_follows_the_first_whatever_the_batch(
    model, tmp_path, chat_endpoint, monkeypatch, sizes, how
):
  tokenizer, prompts, respond = load_tokenizer(model), [], Responder.respond
  letters = np.array(tokenizer.encode(string.ascii_lowercase, add_special_tokens=False))

  def watched(self, members, given, *args, **kwargs):
    prompts.extend(map(tokenizer.decode, given))
    # Random bytes are rarely text: letters in their place.
    return [dataclasses.replace(r, tokens=letters[r.tokens % 26])
            for r in respond(self, members, given, *args, **kwargs)]

  monkeypatch.setattr(Responder, "respond", watched)
  questions = [{"question_id": i, "category": "writing", "turns": [f"one {i}", f"two {i} "]}
               for i in range(6)]
  questions += [{"question_id": 111, "category": "math", "turns": ["1 + 1", "+ 1"]}]
  references = [{"question_id": 111, "choices": [{"turns": ["it is 2", "it is 3"]}]}]
  endpoint = chat_endpoint(lambda body, n: "[[2]]" if "it is 2" in content(body) else "so [[8]]")
  asked, guide = write(tmp_path / "q.jsonl", questions), write(tmp_path / "r.jsonl", references)
  for size in sizes:
    call(f"--model={model}", "--benchmark=mt_bench", f"--data={asked}", "--max_new_tokens=6",
         f"--benchmark.references={guide}", f"--judge_url={endpoint.url}", "--judge_model=j", *how,
         f"--batch_size={size}", f"--output={tmp_path / str(size)}")
  lines, *others = [read_lines(tmp_path / str(size) / "responses.jsonl") for size in sizes]
  assert len(lines) == (14 if how else 7) and all(other == lines for other in others)
  shown = [content(b) for b in endpoint.asked]
  for line in lines:
    (turn,), (first, second) = line["turns"], questions[line["index"]]["turns"]
    assert turn["prompt"] == second and turn["length"] == len(turn["token_ids"]) <= 6
    assert tokenizer.decode(turn["token_ids"]) == turn["response"]
    talk = ("user", first), ("assistant", line["response"]), ("user", second)
    talk = "".join(f"<|{role}|>{text}<|end|>" for role, text in talk) + "<|assistant|>"
    assert prompts.count(talk) == len(sizes)
    both = [text for text in shown if second in text and line["response"] in text]
    assert any(turn["response"] in text for text in both)
  if how:
    assert len({tuple(line["turns"][0]["token_ids"]) for line in lines}) > 12
  found = results(tmp_path / "4")
  metrics = {name: figure["mean"] for name, figure in found["metrics"].items()}
  assert metrics["score/writing"] == 8 and metrics["score/math"] == 2
  assert metrics["score"] == pytest.approx(50 / 7)
  assert metrics["score_right_references"] == 8  # 111 is a wrong one.
  assert found["columns"]["score/math"]["label"] == "Grade, 1 to 10, math"


def test_a_model_without_room_for_the_second_turn_is_refused(model, tmp_path, capsys):
  data = write(tmp_path / "q.jsonl", [{"question_id": 1, "category": "stem", "turns": ["a", "b"]}])
  (tmp_path / "short.py").write_text(OWN)
  with pytest.raises(SystemExit):
    call(f"--model={model}", "--benchmark=mt_bench", f"--data={data}", "--max_new_tokens=78",
         f"--judge={tmp_path}/short.py:Brevity", f"--output={tmp_path}/out")
  assert "--max_new_tokens=78: several turns" in capsys.readouterr().err


def test_a_signal_in_the_middle_of_judging_loses_nothing(given, tmp_path, chat_endpoint, capsys):
  def reply(body, number):
    if number == 5:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.2)
    return "reasons [[A]]"

  endpoint, out = chat_endpoint(reply), tmp_path / "out"
  flags = [*given("lima", 8), f"--judge_url={endpoint.url}", "--judge_model=j",
           "--judge.concurrency=2", f"--output={out}"]
  with pytest.raises(SystemExit) as exit_info:
    call(*flags)
  done = len(endpoint.asked)
  assert exit_info.value.code == 143 and done < 10
  assert f"{done} of 16 judgments are saved" in capsys.readouterr().err
  assert not (out / "results.json").exists()
  call(*flags)
  assert len(endpoint.asked) == 16 == len({content(b) for b in endpoint.asked})
  assert results(out)["metrics"]["win_rate"]["mean"] == 0.5  # The first answer, always: ties.
  with open(out / "judgments.jsonl", "ab") as file:
    file.write(b'{"key": "torn')
  call(*flags)
  assert len(endpoint.asked) == 16 == len(read_lines(out / "judgments.jsonl"))


@pytest.mark.slow
def test_kill_9_in_the_middle_of_judging_asks_again_only_what_was_under_way(
    given, tmp_path, chat_endpoint, entry_point
):
  reached = threading.Event()

  def reply(body, number):
    if number == 7:
      reached.set()
      time.sleep(2)
    return "[[B>>A]]"

  endpoint, out = chat_endpoint(reply), tmp_path / "out"
  flags = [*given("arena_hard", 10), f"--judge_url={endpoint.url}", "--judge_model=j",
           "--judge.concurrency=1", f"--output={out}"]
  command = [sys.executable, "-m", "dpr_jax.evaluate", *flags]
  environment = {**os.environ, "PYTHONPATH": str(entry_point.root)}
  with subprocess.Popen(command, cwd=entry_point.root, env=environment) as process:
    assert reached.wait(120)
    process.send_signal(signal.SIGKILL)
  assert len(endpoint.asked) == 8
  call(*flags)
  asked = [content(b) for b in endpoint.asked]
  assert len(set(asked)) == 20 and asked[7] in asked[8:] and len(asked) == 21
  assert results(out)["metrics"]["win_rate"]["mean"] == 0.5


def test_an_endpoint_that_fails_ends_in_a_line_and_goes_on(given, tmp_path, chat_endpoint, capsys):
  down = threading.Event()
  endpoint = chat_endpoint(lambda b, n: (500, b"broken") if down.is_set() and n > 4 else "[[C]]")
  down.set()
  out = tmp_path / "out"
  flags = [*given("lima"), f"--judge_url={endpoint.url}", "--judge_model=j",
           "--judge.concurrency=1", "--judge.attempts=2", f"--output={out}"]
  with pytest.raises(SystemExit) as exit_info:
    call(*flags)
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert exit_info.value.code == 2 and "no answer after 2 requests" in error and "500" in error
  assert len(_read(out / "judgments.jsonl")) == 5
  down.clear()
  call(*flags)
  assert len(endpoint.asked) == 12 + 2 and results(out)["metrics"]["ties"]["mean"] == 1


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
OWN = re.search(r'```python title="brevity.py"\n(.*?)```', PAGE.read_text(), re.S)[1]


def test_a_judge_of_a_users_file_decides_by_its_rewards(given, tmp_path):
  (tmp_path / "brevity.py").write_text(OWN)
  flags = [*given("arena_hard")[:-1], f"--judge={tmp_path}/brevity.py:Brevity"]
  call(*flags, f"--output={tmp_path}/out")
  found = results(tmp_path / "out")["metrics"]
  assert found["win_rate"]["mean"] == 1 and found["pairs"]["mean"] == 6  # Six tokens against more.
  assert "position_consistency" not in found
  call(*flags, f"--output={tmp_path}/free", "--judge.free=1000")
  assert results(tmp_path / "free")["metrics"]["win_rate"]["mean"] == 0.5


def test_a_local_reward_model_decides(given, model, tmp_path, make_model):
  from safetensors.numpy import load_file, save_file

  # The model of the evaluation itself, with a score in place of its head.
  reward = tmp_path / "reward"
  model, variables = make_model(3, vocab_size=len(byte_tokenizer()), max_length=160, qk_norm=True)
  save_pretrained(reward, model.cfg, variables["params"], tokenizer=byte_tokenizer())
  tensors = load_file(reward / "model.safetensors")
  tensors["score.weight"] = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
  save_file(tensors, reward / "model.safetensors")
  out = tmp_path / "out"
  call(*given("lima")[:-1], f"--judge_model={reward}", f"--output={out}")
  found, lines = results(out), read_lines(out / "judgments.jsonl")
  assert found["judge"] == {"kind": "reward_model", "model": str(reward)}
  rewards = {part: {r["index"]: r["reward"] for r in lines if r["part"] == part}
             for part in ("response", "reference")}
  margins = [rewards["response"][i] - rewards["reference"][i] for i in range(6)]
  assert found["metrics"]["reward_margin"]["mean"] == pytest.approx(np.mean(margins))
  assert found["metrics"]["wins"]["mean"] == pytest.approx(np.mean(np.array(margins) > 0))


BAD = {
    "no judge": ([], "--benchmark=lima needs a judge: --judge_url and --judge_model"),
    "nobody there": (["--judge_url=http://127.0.0.1:9/v1", "--judge_model=j"],
                     "--judge_url=http://127.0.0.1:9/v1 does not answer: "),
    "no url": (["--judge_url=here", "--judge_model=j"], "--judge: url='here' must be an address"),
    "no model": (["--judge_url=http://127.0.0.1:9/v1"], "--judge: model is missing"),
    "no folder": (["--judge_model=nowhere"], "reward model nowhere: no such folder"),
    "no head": (["--judge_model={model}"], "no tensor 'score.weight'; a reward model is"),
    "no kind": (["--judge=jury"], "'jury' is not one of endpoint, log_ratio, reward_model"),
    "a bound": (["--judge_url=http://x/v1", "--judge_model=j", "--judge.concurrency=0"],
                "--judge.concurrency=0 is out of range"),
    "prompts": (["--judge_model={model}", "--judge_prompts=x.jsonl"], "--judge_prompts: a judge"),
    "no prompts": (["--judge_url=http://x/v1", "--judge_model=j", "--judge_prompts=x.jsonl"],
                   "x.jsonl: no such file"),
    "no key": (["--judge_url={closed}", "--judge_model=j"],
               "environment variable OPENAI_API_KEY is not set"),
    "scored without": (["--benchmark=tasks", "--judge_model={model}"],
                       "--judge: --benchmark=tasks is scored without a judge"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(given, model, tmp_path, chat_endpoint, capsys, case):
  argv, message = BAD[case]
  closed = chat_endpoint(lambda body, number: "x")
  closed.models = 401, {}
  flags = [f for f in given("lima") if not f.startswith("--judge.")]
  if case == "scored without":
    flags = flags[:1]
  flags += [flag.format(model=model, closed=closed.url) for flag in argv]
  with pytest.raises(SystemExit) as exit_info:
    call(*flags, f"--output={tmp_path}/out")
  error = capsys.readouterr().err.strip()
  assert exit_info.value.code == 2 and error.count("\n") == 0 and message in error, error
  assert not (tmp_path / "out" / "responses.jsonl").exists() and not closed.asked


def test_a_judge_that_repeats_a_response_has_not_decided(given, tmp_path, chat_endpoint):
  flags = given("lima")
  write(tmp_path / "pairs.jsonl",
        [{"prompt": f"ask {i}", "response": f"[[A]] {i} Verdict: [[ B ]]"} for i in range(6)])
  quoting = chat_endpoint(lambda body, number: content(body))
  call(*flags, f"--judge_url={quoting.url}", "--judge_model=q", f"--output={tmp_path}/out")
  assert results(tmp_path / "out")["metrics"]["unparsable"]["mean"] == 1
  deciding = chat_endpoint(lambda body, number: f"{content(body)}\n[[B]]")
  call(*flags, f"--judge_url={deciding.url}", "--judge_model=d", f"--output={tmp_path}/out")
  metrics = results(tmp_path / "out")["metrics"]
  assert metrics["unparsable"]["mean"] == 0 and metrics["ties"]["mean"] == 1


def test_replies_and_lines_that_are_none_are_named(given, tmp_path, capsys):
  out = tmp_path / "out"
  for name, reply, said in (
      ("words", '{"text": "[[A]]"}', "must have a reward, a finite number or None"),
      ("infinite", '{"reward": float("inf")}', "must have a reward"), ("none", "3", "the reply 3"),
  ):
    code = OWN.replace('{"reward": -max(0, length - self.free)}', reply)
    (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(SystemExit):
      call(*given("lima")[:-1], f"--judge={tmp_path}/{name}.py:Brevity", f"--output={out}")
    assert said in capsys.readouterr().err
  good = json.dumps(fingerprints.seal({"key": "0", "reward": 1}))
  edited = json.dumps({**fingerprints.seal({"key": "1", "reward": 1}), "reward": 2})
  (out / "judgments.jsonl").write_text(f"{good}\n{edited}\n")
  with pytest.raises(SystemExit):
    call(*given("lima")[:-1], f"--judge={tmp_path}/none.py:Brevity", f"--output={out}")
  assert "judgments.jsonl:2: not a judgment; delete this line" in capsys.readouterr().err
