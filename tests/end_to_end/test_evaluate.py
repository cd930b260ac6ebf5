"""python -m dpr_jax.evaluate on a random model, and on the stages of a run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from dpr_jax import cli, evaluate, generate
from dpr_jax.data.tasks import make_demos, verify
from dpr_jax.evaluation.benchmark_run import EvaluationFolder
from dpr_jax.evaluation.responses import Responder
from dpr_jax.weights import load_tokenizer, save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import read_lines


def call(*argv):
  cli.run_entry_point(evaluate.main, [str(a) for a in argv])


def lines(folder):
  return read_lines(folder / "responses.jsonl")


def results(folder):
  return json.loads((folder / "results.json").read_text())


@pytest.fixture
def model(tmp_path, make_model):
  """A Hugging Face folder with random weights."""
  tokenizer = byte_tokenizer()
  model, variables = make_model(1, vocab_size=len(tokenizer), max_length=128)
  save_pretrained(tmp_path / "model", model.cfg, variables["params"], tokenizer=tokenizer)
  return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
  """Records with an answer each, and one that was cut off."""
  path = tmp_path / "data.jsonl"
  words = ("no", "yes", "so", "a b", "perhaps")
  records = [{"prompt": f"say {w}", "response": w * 3} for w in words]
  records[2]["hit_eos"] = False
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def test_samples_are_scored_and_averaged_over_prompts(model, tmp_path, capsys):
  (tmp_path / "mine.py").write_text(textwrap.dedent("""
      import dataclasses
      from dpr_jax.evaluation.metrics import ResponseMetric

      @dataclasses.dataclass(frozen=True, kw_only=True)
      class Words(ResponseMetric):
        title, unit = "Words", "words"

        def score(self, record):
          return len(record["response"].split())
  """))
  out = tmp_path / "out"
  call(f"--model={model}", "--benchmark=tasks", f"--output={out}", "--max_prompts=13",
       "--samples=3", "--temperature=1", "--max_new_tokens=9", "--batch_size=4",
       f"--metrics=length,{tmp_path}/mine.py:Words")
  records, found = lines(out), results(out)
  assert [(r["index"], r["sample"]) for r in records] == [divmod(line, 3) for line in range(39)]
  assert len({tuple(r["token_ids"]) for r in records}) > 20
  for r in records:
    assert 1 <= r["length"] == len(r["token_ids"]) <= 9
    assert r["scores"] == {
        "accuracy": verify(r["groups"][0], r["prompt"], r["response"]), "length": r["length"],
        "words": len(r["response"].split()),
    }
  assert found["n"] == 13 and found["benchmark"] == "tasks" and found["model"] == str(model)
  words = np.array([r["scores"]["words"] for r in records])
  assert found["metrics"]["words"]["mean"] == pytest.approx(words.mean())
  assert {"accuracy", "length", "words", "pass@2", "pass@3"} <= set(found["metrics"])
  assert found["columns"]["words"]["label"] == "Words"
  assert "Words" in capsys.readouterr().out


def test_greedy_responses_are_those_of_generate(model, data, tmp_path):
  given = [f"--model={model}", "--max_new_tokens=12", "--temperature=0"]
  run = lambda module, *argv: cli.run_entry_point(module.main, [*given, *argv])
  run(generate, f"--input={data}", f"--output={tmp_path}/out.jsonl")
  whole = read_lines(tmp_path / "out.jsonl")
  # Random bytes are rarely text: a character that is.
  stop = next(c for r in whole for c in r["response"][1:] if c.isascii() and c not in "<|>")
  for name, stops in (("free", []), ("stopped", [f"--stop={stop}"])):
    run(evaluate, "--benchmark=exact", f"--data={data}", f"--output={tmp_path / name}", *stops)
  free, cut = lines(tmp_path / "free"), lines(tmp_path / "stopped")
  for a, b, stopped in zip(whole, free, cut, strict=True):
    assert {k: b[k] for k in a if k in b} == {k: a[k] for k in a if k in b}
    assert stopped["response"] == b["response"].partition(stop)[0]
    assert stopped["hit_eos"] == (stop in b["response"] or b["hit_eos"])
  assert any(stop in r["response"] for r in free)


def test_a_benchmark_of_a_users_file_has_its_fields_as_flags(model, data, tmp_path):
  file = tmp_path / "contains.py"
  file.write_text(textwrap.dedent("""
      import dataclasses
      from dpr_jax.config.fields import setting
      from dpr_jax.evaluation.benchmarks import Benchmark
      from dpr_jax.evaluation.metrics import ACCURACY

      @dataclasses.dataclass(frozen=True, kw_only=True)
      class Shorter(Benchmark):
        scores = {"accuracy": ACCURACY}
        than: int = setting(5, "tokens", low=1)

        def score(self, demo, text):
          return {"accuracy": float(len(text) < self.than)}
  """))
  given = [f"--model={model}", f"--data={data}", f"--benchmark={file}:Shorter",
           "--max_new_tokens=3"]
  call(*given, f"--output={tmp_path}/long", "--benchmark.than=100")
  call(*given, f"--output={tmp_path}/short", "--benchmark.than=1")
  assert results(tmp_path / "long")["metrics"]["accuracy"]["mean"] == 1
  assert results(tmp_path / "short")["settings"]["benchmark.than"] == 1
  assert all(r["scores"]["accuracy"] == (not r["response"]) for r in lines(tmp_path / "short"))
  # Scores of another program must not mix with these.
  file.write_text(file.read_text() + "\n# changed\n")
  with pytest.raises(SystemExit):
    call(*given, f"--output={tmp_path}/long", "--benchmark.than=100")


KILLED = ["--benchmark=tasks", "--samples=2", "--temperature=1", "--batch_size=4", "--seed=5"]


def test_an_evaluation_that_is_stopped_after_any_block_goes_on_to_the_same_files(
    model, tmp_path, monkeypatch, capsys
):
  asked = []
  respond, append = Responder.respond, EvaluationFolder.append

  def counted(self, members, prompts, *args, **kwargs):
    asked.append(len(prompts))
    return respond(self, members, prompts, *args, **kwargs)

  monkeypatch.setattr(Responder, "respond", counted)
  given = [f"--model={model}", *KILLED, "--max_prompts=20", "--max_new_tokens=6"]
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  call(*given, f"--output={whole}")
  assert asked == [8, 8, 4]
  asked.clear()

  def torn(self, records):
    append(self, records)
    with open(self.responses_file, "ab") as file:
      file.write(b'{"index": ')
    os.kill(os.getpid(), signum)
    os.kill(os.getpid(), signal.SIGTERM)  # A second one changes nothing.

  with monkeypatch.context() as patch:
    patch.setattr(EvaluationFolder, "append", torn)
    for done, signum in ((16, signal.SIGINT), (32, signal.SIGTERM), (40, signal.SIGTERM)):
      with pytest.raises(SystemExit) as exit_info:
        call(*given, f"--output={parts}")
      assert exit_info.value.code == 128 + signum
      assert f"{done} of 40 responses are saved" in capsys.readouterr().err
  assert not (parts / "results.json").exists()
  call(*given, f"--output={parts}")
  assert asked == [8, 8, 4]  # Nothing twice.
  for name in ("responses.jsonl", "results.json"):
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
  # A finished one asks nothing and makes its results again.
  (parts / "results.json").unlink()
  capsys.readouterr()
  call(*given, f"--output={parts}")
  assert "finished already" in capsys.readouterr().out and asked == [8, 8, 4]
  assert (parts / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_kill_9_loses_a_block_at_most(model, tmp_path, entry_point):
  given = [f"--model={model}", *KILLED, "--max_prompts=200", "--max_new_tokens=40"]
  command = [sys.executable, "-m", "dpr_jax.evaluate", *given, f"--output={tmp_path}/killed"]
  environment = {**os.environ, "PYTHONPATH": str(entry_point.root)}
  file = tmp_path / "killed" / "responses.jsonl"
  with subprocess.Popen(command, cwd=entry_point.root, env=environment) as process:
    while not file.exists() or not file.stat().st_size:
      assert process.poll() is None
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
  assert 0 < file.read_bytes().count(b"\n") < 400
  for name in ("killed", "whole"):
    call(*given, f"--output={tmp_path / name}")
  for name in ("responses.jsonl", "results.json"):
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


CHANGES = {
    "--seed": "--seed=6",
    "--batch_size": "--batch_size=16",
    "--temperature": "--temperature=0.5",
    "--max_new_tokens": "--max_new_tokens=7",
    "--max_prompts": "--max_prompts=5",
    "--benchmark": "--benchmark=exact",
    "--metrics": "--metrics=",
    "--stop": "--stop=x",
    "--data": "--data={changed}",
    "--model": "--model={other}",
    "--template": "--template={template}",
}


def test_a_resume_with_another_setting_is_refused_by_its_flag(
    model, data, tmp_path, make_model, capsys
):
  out, other, changed = tmp_path / "out", tmp_path / "other", tmp_path / "changed.jsonl"
  cfg, variables = make_model(2, vocab_size=len(byte_tokenizer()), max_length=128)
  save_pretrained(other, cfg.cfg, variables["params"], tokenizer=byte_tokenizer())
  changed.write_text(data.read_text() + '{"prompt": "say x", "response": "x"}\n')
  template = tmp_path / "t.jinja"
  template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
  given = {
      "--model": f"--model={model}", "--benchmark": "--benchmark=exact", "--data": f"--data={data}",
      "--temperature": "--temperature=1", "--output": f"--output={out}",
      "--max_new_tokens": "--max_new_tokens=3", "--max_prompts": "--max_prompts=2",
  }
  call(*given.values())
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  for flag, value in CHANGES.items():
    if flag == "--benchmark":
      value = f"--benchmark={tmp_path}/same.py:Same"
      (tmp_path / "same.py").write_text(
          "import dataclasses\nfrom dpr_jax.evaluation.benchmarks.exact import Exact\n"
          "@dataclasses.dataclass(frozen=True)\nclass Same(Exact):\n  pass\n")
    value = value.format(changed=changed, other=other, template=template)
    with pytest.raises(SystemExit) as exit_info:
      call(*{**given, flag: value}.values())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_info.value.code == 2 and f"{flag} (" in error, error
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_perplexity_is_that_of_transformers(model, data, tmp_path):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  from dpr_jax.data.formats import read_demos
  from dpr_jax.data.templates import render_prompt

  out, tokenizer = tmp_path / "out", load_tokenizer(model)
  call(f"--model={model}", "--benchmark=perplexity", f"--data={data}", f"--output={out}",
       "--batch_size=2")
  reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
  total, tokens = 0.0, 0
  for i, (r, demo) in enumerate(zip(lines(out), read_demos(data).demos, strict=True)):
    prompt = render_prompt(demo.prompt, tokenizer).tolist()
    ended = r["token_ids"][-1] == tokenizer.eos_token_id
    assert ended == r["hit_eos"] == (i != 2)
    assert r["length"] == len(demo.response) + ended  # A token per byte.
    with torch.no_grad():
      logits = reference(torch.tensor([prompt + r["token_ids"]])).logits[0]
    logp = torch.log_softmax(logits, -1)[torch.arange(-r["length"] - 1, -1), r["token_ids"]]
    np.testing.assert_allclose(r["logps"], logp.numpy(), atol=2e-5)
    assert r["scores"]["nll"] == pytest.approx(-float(logp.sum()), rel=1e-5)
    total, tokens = total - float(logp.sum()), tokens + r["length"]
  found = results(out)["metrics"]
  assert found["corpus_perplexity"]["mean"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
  assert found["nll"]["mean"] == pytest.approx(total / 5, rel=1e-5)


def test_worked_examples_and_stop_strings_reach_the_model(model, tmp_path, monkeypatch):
  files = {}
  for name, start in (("test", 0), ("train", 50)):
    files[name] = tmp_path / f"{name}.jsonl"
    records = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(start, start + 3)]
    files[name].write_text("".join(json.dumps(r) + "\n" for r in records))
  seen = []
  respond = Responder.respond

  def watched(self, members, prompts, *args, **kwargs):
    seen.append((self.stop_strings, [load_tokenizer(model).decode(p) for p in prompts]))
    return respond(self, members, prompts, *args, **kwargs)

  monkeypatch.setattr(Responder, "respond", watched)
  call(f"--model={model}", "--benchmark=gsm8k", f"--data={files['test']}", "--benchmark.shots=2",
       f"--benchmark.shots_file={files['train']}", "--stop=##", f"--output={tmp_path}/out",
       "--max_new_tokens=4")
  ((stops, prompts),) = seen
  assert set(stops) == {"Question:", "\n\nQuestion:", "##"}
  for i, prompt in enumerate(prompts):
    assert prompt.index("50?") < prompt.index("#### 51") < prompt.index(f"Question: {i}?\nAnswer:")


def test_a_folder_of_files_is_data_whose_content_is_compared(model, data, tmp_path, capsys):
  folder, out = tmp_path / "folder", tmp_path / "out"
  folder.mkdir()
  (folder / "a.jsonl").write_bytes(data.read_bytes())
  given = [f"--model={model}", "--benchmark=perplexity", f"--data={folder}", f"--output={out}"]
  call(*given)
  assert results(out)["n"] == 5
  (folder / "b.jsonl").write_text('{"prompt": "say x", "response": "x"}\n')
  with pytest.raises(SystemExit) as exit_info:
    call(*given)
  assert exit_info.value.code == 2 and "--data (" in capsys.readouterr().err


def test_a_stage_answers_as_in_the_evaluation_of_its_run(finished_run, tmp_path):
  workdir, out = finished_run[0], tmp_path / "out"
  config = json.loads((workdir / "config.json").read_text())["config"]
  record, tasks = config["eval"], ",".join(config["data"]["tasks"])
  call(f"--model={workdir}/sft", "--benchmark=tasks", f"--output={out}",
       f"--max_prompts={record['num_prompts']}", f"--max_new_tokens={record['max_new_tokens']}",
       f"--batch_size={record['batch_size']}", f"--benchmark.tasks={tasks}")
  inside = [r for r in read_lines(workdir / "samples" / "sft.jsonl") if r["mode"] == "greedy"]
  assert len(inside) == len(lines(out)) == 32
  for a, b in zip(lines(out), inside, strict=True):
    for name in ("prompt", "answer", "groups", "response", "token_ids", "length", "hit_eos"):
      assert a[name] == b[name]
    assert a["scores"] == b["scores"]
  table = json.loads((workdir / "report" / "results.json").read_text())["systems"]["sft"]
  found = results(out)["metrics"]
  assert found["accuracy"] == table["accuracy_greedy"]
  assert found["accuracy/unique"] == table["accuracy_greedy/unique"]


def test_prompts_that_a_stage_was_trained_on_are_reported_or_refused(
    finished_run, tmp_path, caplog, capsys
):
  workdir, out = finished_run[0], tmp_path / "out"
  record = json.loads((workdir / "config.json").read_text())
  trained = make_demos(record["config"]["data"]["tasks"], 3, record["seed"])
  data = tmp_path / "data.jsonl"
  asked = [d.prompt[-1]["content"] for d in trained] + ["never seen"]
  data.write_text("".join(json.dumps({"prompt": p, "response": "x"}) + "\n" for p in asked))
  given = [f"--model={workdir}/sft", "--benchmark=exact", f"--data={data}", f"--output={out}",
           "--max_new_tokens=2"]
  with pytest.raises(SystemExit) as exit_info:
    call(*given, "--strict_overlap")
  assert exit_info.value.code == 2 and not out.exists()
  assert "--strict_overlap: 3 of 4 prompts are among" in capsys.readouterr().err
  call(*given)
  found = results(out)["overlap"]
  assert found["count"] == 3 and found["first"][1]["prompt"] == f"{data}:2"
  assert caplog.text.count("3 of 4 prompts are among") == 1


def test_a_library_that_is_not_installed_is_named(model, data, tmp_path, capsys):
  (tmp_path / "needs.py").write_text(textwrap.dedent("""
      import dataclasses
      from dpr_jax.evaluation.benchmarks.exact import Exact

      @dataclasses.dataclass(frozen=True, kw_only=True)
      class Needs(Exact):
        packages = ("numpy", "no-such-package")
  """))
  with pytest.raises(SystemExit) as exit_info:
    call(f"--model={model}", f"--benchmark={tmp_path}/needs.py:Needs", f"--data={data}",
         f"--output={tmp_path}/out")
  assert exit_info.value.code == 2 and not (tmp_path / "out").exists()
  assert ("needs no-such-package, which is not installed: pip install 'dpr_jax[eval]'"
          in capsys.readouterr().err)


BAD = {
    "unknown benchmark": ({"benchmark": "bleu"}, "'bleu' is not one of alpaca_eval, arena_hard"),
    "no such file": ({"benchmark": "nowhere.py:Mine"}, "nowhere.py:Mine: no such file"),
    "no such module": ({"benchmark": "nowhere:Mine"}, "--benchmark=nowhere:Mine: ModuleNotFound"),
    "no benchmark": ({"benchmark": "dpr_jax.rewards.base:Reward"}, "--benchmark"),
    "no metric": ({"metrics": "length,expert"}, "--metrics=expert: Expert must be"),
    "metric twice": ({"metrics": "length,length"}, "another score called length"),
    "no data": ({"data": None}, "--data is missing"),
    "data of tasks": ({"benchmark": "tasks"}, "tasks makes its own prompts"),
    "missing file": ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "other format": ({"benchmark": "gsm8k"}, "data.jsonl:1: the answer 'nonono' is not a number"),
    "bad line": ({"data": "{bad}"}, "bad.jsonl:2: malformed JSON"),
    "no such field": ({"benchmark.shots": "1"}, "benchmark.shots"),
    "field": ({"benchmark": "gsm8k", "benchmark.shots": "-1"}, "--benchmark.shots=-1 is out of"),
    "choices": ({"benchmark": "tasks", "benchmark.tasks": "add,dance", "data": None},
                "--benchmark.tasks='dance' is not one of add"),
    "fields": ({"benchmark": "gsm8k", "benchmark.shots": "1"}, "--benchmark: shots=1 and shots_fi"),
    "too long": ({"max_new_tokens": "500"}, "data.jsonl:1: a prompt of 9 tokens and --max_new_tok"),
    "greedy samples": ({"samples": "2", "temperature": "0"}, "--samples=2: greedy"),
    "sampling": ({"top_p": "2"}, "top_p"),
    "empty stop": ({"stop": ""}, "--stop: stop string '' is empty"),
    "generates nothing": ({"benchmark": "perplexity", "seed": "1"}, "--seed: perplexity scores"),
    "model": ({"model": "nowhere"}, "nowhere: no such checkpoint"),
    "not ifeval": ({"benchmark": "ifeval"}, "data.jsonl:1: no prompt of IFEval; expected"),
    "output": ({"output": "{data}/below"}, "cannot be written"),
    "foreign output": ({"output": "{model}"}, "no config.json of an evaluation"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model, data, tmp_path, capsys):
  changes, expected = BAD[case]
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
  given = {"model": str(model), "benchmark": "exact", "data": str(data),
           "output": str(tmp_path / "out"), "max_new_tokens": "2"}
  if changes.get("benchmark") == "perplexity":
    del given["max_new_tokens"]
  for flag, value in changes.items():
    given.pop(flag, None)
    if value is not None:
      given[flag] = value.format(data=data, model=model, bad=bad)
  before = sorted(p for p in tmp_path.rglob("*"))
  with pytest.raises(SystemExit) as exit_info:
    call(*(f"--{flag}={value}" for flag, value in given.items()))
  error = capsys.readouterr().err.strip().splitlines()
  assert exit_info.value.code == 2 and expected in error[-1] and len(error) <= 2, error
  assert sorted(p for p in tmp_path.rglob("*")) == before
