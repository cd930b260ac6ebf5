"""lm-evaluation-harness on our models equals the harness on transformers, to the item."""

import json
import socket

import numpy as np
import pytest

from dpr_jax import cli, evaluate
from dpr_jax.weights import save_pretrained
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import read_lines

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{text}"
{more}
"""
TASKS = {
    "local_mc": ("multiple_choice", r"Q: {{question}}\nA:", """
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""),
    "local_gen": ("generate_until", r"Q: {{question}}\nA:", """
doc_to_target: answer
generation_kwargs: {until: ["ba", "c", "</s>"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""),
    "local_roll": ("loglikelihood_rolling", "", """
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""),
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """No connection can be tried."""

  def refuse(*args, **kwargs):
    raise AssertionError("a connection was tried")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
  """Three tasks with their data; some documents are longer than the model."""
  rng = np.random.default_rng(0)
  word = lambda: "".join(rng.choice(list("abcdefgh"), rng.integers(2, 6)))
  lines = []
  for i in range(9):
    record = {"question": " ".join(word() for _ in range([3, 9, 30][i % 3])), "answer": word(),
              "choices": [*"abcdefgh", word(), word()], "label": int(rng.integers(10))}
    lines.append(json.dumps(record) + "\n")
  (tmp_path / "data.jsonl").write_text("".join(lines))
  (tmp_path / "tasks").mkdir()
  for name, (kind, text, more) in TASKS.items():
    (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(
        name=name, data=tmp_path / "data.jsonl", kind=kind, text=text, more=more))
  return tmp_path / "tasks"


@pytest.fixture
def model(tmp_path, make_model):
  """A Hugging Face folder with random weights that mostly say letters of the tasks."""
  tokenizer = byte_tokenizer()
  model, variables = make_model(1, vocab_size=len(tokenizer), max_length=63)
  for token in tokenizer("abcdefgh")["input_ids"]:
    variables["params"]["embed"]["table"][token] *= 4
  save_pretrained(tmp_path / "model", model.cfg, variables["params"], tokenizer=tokenizer)
  return tmp_path / "model"


def call(*argv):
  cli.run_entry_point(evaluate.main, [str(a) for a in argv])


def of_transformers(model, folder, names, **how):
  """(results, samples) of the harness's own model, which calls transformers."""
  pytest.importorskip("torch")
  import transformers
  from lm_eval.evaluator import evaluate as run
  from lm_eval.models.huggingface import HFLM

  from dpr_jax.evaluation.benchmarks.lm_eval import LMEval

  theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  lm = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1, max_length=63, device="cpu")
  shots = how.pop("num_fewshot", None)
  tasks = LMEval(tasks=names, num_fewshot=shots).load(str(folder))
  found = run(lm=lm, task_dict=tasks, bootstrap_iters=0, **how)
  return found["results"], found["samples"]


def check_items(out, samples, names):
  """Compares the lines of responses.jsonl with the harness's samples; returns what was greedy."""
  lines, greedy = read_lines(out / "responses.jsonl"), []
  for name in names:
    for sample in samples[name]:
      mine = [r for r in lines if r["task"] == name and r["doc"] == sample["doc_id"]]
      if name == "local_mc":
        for (theirs,), ours in zip(sample["resps"], mine, strict=True):
          assert ours["logp"] == pytest.approx(float(theirs[0]), abs=2e-4)
          assert ours["is_greedy"] == (str(theirs[1]) == "True")
          greedy.append(ours["is_greedy"])
      elif name == "local_gen":
        until = ["ba", "c", "</s>"]
        text = mine[0]["response"]
        for stop in until:
          text = text.split(stop)[0]
        assert [[text]] == sample["resps"]
      else:  # A text that is longer than the model has several windows.
        assert sum(r["logp"] for r in mine) == pytest.approx(float(sample["resps"][0][0]), abs=2e-3)
  return greedy


def test_figures_and_items_equal_those_of_transformers(model, folder, tmp_path, offline, capsys):
  out = tmp_path / "out"
  given = [f"--model={model}", f"--benchmark=lm_eval:{','.join(TASKS)}", f"--data={folder}"]
  call(*given, f"--output={out}")
  theirs, samples = of_transformers(model, folder, tuple(TASKS))
  greedy = check_items(out, samples, TASKS)
  assert 0 < sum(greedy) < len(greedy)
  texts = {r["response"] for r in read_lines(out / "responses.jsonl") if r["task"] == "local_gen"}
  assert len(texts) > 3
  found = json.loads((out / "results.json").read_text())
  assert found["n"] == 27 and "lm-eval" in found["versions"]
  ours = found["metrics"]
  for task, figures in theirs.items():
    for key, value in figures.items():
      metric, _, none = key.partition(",")
      if none and "_stderr" not in metric:
        assert ours[f"{task}/{metric}"]["mean"] == pytest.approx(value, rel=1e-4)
  # Stopped in the middle of a line, it goes on to the same files.
  whole = {p.name: p.read_bytes() for p in out.iterdir()}
  (out / "responses.jsonl").write_bytes(whole["responses.jsonl"][:3000])
  (out / "results.json").unlink()
  capsys.readouterr()
  call(*given, f"--output={out}")
  assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
  assert "local_mc/acc" in capsys.readouterr().out


def test_the_chat_template_and_worked_examples_are_those_of_transformers(
    model, folder, tmp_path, offline
):
  names = ("local_mc", "local_gen")
  # One of the files stands for its folder.
  call(f"--model={model}", f"--benchmark=lm_eval:{','.join(names)}",
       f"--data={folder}/local_mc.yaml", "--benchmark.chat", "--benchmark.num_fewshot=1",
       f"--output={tmp_path}/out", "--max_prompts=4")
  _, samples = of_transformers(
      model, folder, names, apply_chat_template=True, fewshot_as_multiturn=True, num_fewshot=1,
      limit=4,
  )
  assert "assistant" in samples["local_gen"][0]["arguments"][0][0]
  check_items(tmp_path / "out", samples, names)


BAD = {
    "unknown task": ({"benchmark": "lm_eval:nonsense"}, "no task 'nonsense'; --data="),
    "no task": ({"benchmark": "lm_eval"}, "lm_eval names no task; for"),
    "no folder": ({"data": "nowhere"}, "--data=nowhere: no such file or folder"),
    "other file": ({"data": "{folder}/../data.jsonl"}, "expected a folder with the .yaml files"),
    "download": ({"benchmark": "lm_eval:remote"}, "its data must be local, nothing is downloaded"),
    "bad text": ({"benchmark": "lm_eval:bad_text"}, "No filter named 'nofilter'"),
    "beams": ({"benchmark": "lm_eval:beams"}, "beams asks for num_beams=4"),
    "penalty": ({"benchmark": "lm_eval:penalty"}, "generation_kwargs of penalty have repet"),
    "too long": ({"benchmark": "lm_eval:too_long"}, "too_long wants max_gen_toks=63"),
    "sampling": ({"temperature": "1"}, "--temperature: lm_eval:local_gen says itself"),
    "metrics": ({"metrics": "length"}, "--metrics: lm_eval:local_gen says itself"),
    "overlap": ({"strict_overlap": "true"}, "--strict_overlap: the training"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model, folder, tmp_path, offline, capsys):
  base = (folder / "local_gen.yaml").read_text()
  for name, old, new in (
      ("beams", "do_sample: false", "num_beams: 4"),
      ("penalty", "do_sample: false", "repetition_penalty: 1.2"),
      ("too_long", "max_gen_toks: 12", "max_gen_toks: 63"),
      ("bad_text", "{{question}}", "{{question | nofilter}}"),
  ):
    assert old in base
    (folder / f"{name}.yaml").write_text(base.replace(old, new).replace("local_gen", name))
  (folder / "remote.yaml").write_text(
      base[: base.index("dataset_path")].replace("local_gen", "remote")
      + "dataset_path: someone/something\n" + base[base.index("test_split"):])
  changes, expected = BAD[case]
  given = {"model": model, "benchmark": "lm_eval:local_gen", "data": folder,
           "output": tmp_path / "out", **changes}
  given["data"] = str(given["data"]).format(folder=folder)
  with pytest.raises(SystemExit) as exit_info:
    call(*(f"--{flag}={value}" for flag, value in given.items()))
  assert exit_info.value.code == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ") and expected in error
  assert not (tmp_path / "out").exists()
