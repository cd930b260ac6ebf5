"""Benchmarks against answers judged by hand."""

import json
import math
import pathlib

import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.config.fields import kinds
from dpr_jax.data.demos import Demo
from dpr_jax.data.tasks import is_heldout
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks import Benchmark
from dpr_jax.evaluation.benchmarks.exact import Exact
from dpr_jax.evaluation.benchmarks.gsm8k import GSM8K
from dpr_jax.evaluation.benchmarks.ifeval import IFEval
from dpr_jax.evaluation.benchmarks.long_tasks import LongTasks
from dpr_jax.evaluation.benchmarks.perplexity import Perplexity
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.evaluation.metrics import MinorityStyle

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


def demo(answer, response="", prompt="q", task=""):
  messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
  return Demo(messages, answer, task)


@pytest.fixture
def problems(tmp_path):
  """write(name, n, first) -> a file of problems; problem i is answered by i."""

  def write(name, n, first=0):
    path = tmp_path / name
    records = [
        {"question": f"What is {i} + 0?", "answer": f"It is {i} + 0 = <<{i}+0={i}>>{i}.\n#### {i}"}
        for i in range(first, first + n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path

  return write


@pytest.mark.parametrize(
    ("answer", "response", "strict", "flexible"),
    [
        ("18", "so 9 * 2 = 18\n#### 18", 1, 1),
        ("18", "the answer is 18.", 0, 1),
        ("18", "#### 18.", 1, 1),
        ("18", "#### 18 dollars, not 20", 1, 0),
        ("18", "#### 20\n#### 18", 0, 1),  # The first one counts.
        ("1,234", "#### 1234", 1, 1),
        ("1234", "#### 1,234, and that is all", 1, 1),
        ("1234", "#### $1,234.00", 0, 0),
        ("1234", "It costs $1,234.", 0, 1),
        ("-3", "#### -3", 1, 1),
        ("-3", "#### -$3.", 0, 1),
        ("3", "#### -3", 0, 0),
        ("18", "#### 180", 0, 0),
        ("0.5", "#### 0.50", 0, 0),
        ("18", "", 0, 0),
        ("18", "eighteen", 0, 0),
        ("18", "first 5, then 18", 0, 1),
        ("18", "####18", 0, 1),
        ("100", "#### 100", 1, 1),
    ],
)
def test_gsm8k(answer, response, strict, flexible):
  scores = GSM8K().score(demo(answer), response)
  assert scores == {"accuracy": strict, "accuracy_flexible": flexible}


def test_gsm8k_scores_as_the_filters_of_the_harness(rng):
  pytest.importorskip("lm_eval")
  import yaml
  from lm_eval import tasks
  from lm_eval.api.metrics import exact_match_hf_evaluate
  from lm_eval.filters.extraction import RegexFilter

  task = yaml.safe_load((pathlib.Path(tasks.__path__[0]) / "gsm8k/gsm8k.yaml").read_text())
  filters = [RegexFilter(**{k: v for k, v in f["filter"][0].items() if k != "function"})
             for f in task["filter_list"]]
  how = {k: v for k, v in task["metric_list"][0].items() if k in (
      "regexes_to_ignore", "ignore_case", "ignore_punctuation")}
  pieces = ["####", "#### ", " ", "-", "$", ",", ".", "7", "18", "1,234", "0.50", "so ", "\n", "%"]
  texts = ["".join(rng.choice(pieces, rng.integers(0, 9))) for _ in range(3000)]
  answers, right = ["18", "-7", "1,234", "0.50", "18."], 0
  for i, text in enumerate(texts):
    answer = answers[i % len(answers)]
    theirs = [
        float(exact_match_hf_evaluate(
            predictions=f.apply([[text]], [{}])[0], references=[f"Thus.\n#### {answer}"], **how
        )["exact_match"])
        for f in filters
    ]
    assert list(GSM8K().score(demo(answer), text).values()) == theirs, (answer, text)
    right += sum(theirs)
  assert right > 100


def test_gsm8k_asks_the_problem_alone_or_after_worked_examples(problems):
  asked, train = problems("test.jsonl", 3), problems("train.jsonl", 9, first=100)
  plain = GSM8K()
  assert [plain.prompt(d)[-1]["content"] for d in plain.read(asked)] == [
      f"What is {i} + 0?" for i in range(3)
  ]
  assert plain.stop_strings == ()
  shots = GSM8K(shots=2, shots_file=str(train))
  first, second = shots.read(asked, limit=2)
  (message,) = shots.prompt(second)
  assert message == {"role": "user", "content": (
      "Question: What is 100 + 0?\nAnswer: It is 100 + 0 = 100.\n#### 100\n\n"
      "Question: What is 101 + 0?\nAnswer: It is 101 + 0 = 101.\n#### 101\n\n"
      "Question: What is 1 + 0?\nAnswer:"
  )}
  assert "Question:" in shots.stop_strings
  assert shots.score(first, " 0 + 0 = 0\n#### 0")["accuracy"] == 1


def test_gsm8k_refuses_what_makes_its_figures_mean_something_else(problems, tmp_path):
  asked = problems("test.jsonl", 3)
  with pytest.raises(ValueError, match="shots=2 and shots_file=''"):
    GSM8K(shots=2)
  with pytest.raises(UserError, match="3 examples; shots=4"):
    GSM8K(shots=4, shots_file=str(asked)).read(problems("other.jsonl", 2, first=9))
  with pytest.raises(UserError, match=r"test.jsonl:2: this problem is one of the worked examples"):
    GSM8K(shots=2, shots_file=str(problems("train.jsonl", 2, first=1))).read(asked)
  (tmp_path / "chat.jsonl").write_text('{"prompt": "1 + 1?", "response": "two"}\n')
  with pytest.raises(UserError, match=r"chat.jsonl:1: the answer 'two' is not a number"):
    GSM8K().read(tmp_path / "chat.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the problems of GSM8K")
def test_demonstrations_of_gsm8k_are_right():
  benchmark = GSM8K(shots=5, shots_file=str(SHARED / "train.jsonl"))
  demos = benchmark.read(SHARED / "test.jsonl")
  assert len(demos) == 1319
  for d in demos:
    assert benchmark.score(d, d.response) == {"accuracy": 1.0, "accuracy_flexible": 1.0}
    assert benchmark.prompt(d)[0]["content"].count("Question: ") == 6


@pytest.mark.parametrize(
    ("answer", "response", "accuracy", "f1"),
    [
        ("He goes to the park.", "he goes to park", 1, 1.0),
        ("The cat sat", "cat sat down here", 0, 2 * 2 / (2 + 4)),
        ("alpha beta", "gamma", 0, 0.0),
        ("a a b", "b b", 0, 2 * 1 / (1 + 2)),  # Articles go, and repeats count once each.
        ("", "", 1, 1.0),
        ("x", "", 0, 0.0),
    ],
)
def test_exact(answer, response, accuracy, f1):
  scores = Exact().score(demo(answer), response)
  assert scores["accuracy"] == accuracy
  assert scores["token_f1"] == pytest.approx(f1)


def test_tasks_ask_the_checker_of_the_task():
  given = demo("5", "5", "add 2 3", "add")
  assert Tasks().score(given, "5") == {"accuracy": 1.0}
  assert Tasks().score(given, " 5") == {"accuracy": 0.0}


def test_tasks_makes_heldout_prompts_and_more_of_them_append():
  few, many = Tasks().read("", 20), Tasks().read("", 50)
  assert many[:20] == few and len(many) == 50
  assert all(is_heldout(d.prompt[-1]["content"]) for d in many)
  assert all(Tasks().score(d, d.response)["accuracy"] for d in many)
  # Naming tasks changes nothing of their prompts.
  named = Tasks(tasks=("sort", "add")).read("", 8)
  for task in ("sort", "add"):
    alone, among = ([d.messages for d in x if d.task == task] for x in (named, many))
    assert alone == among[:4] and len(alone) == 4


def test_long_tasks_score_steps_and_results():
  benchmark = LongTasks()
  given = demo("13;22", "13;22", "sum 08 05 09", "scratchpad")
  score = lambda text: tuple(benchmark.score(given, text).values())
  assert list(benchmark.score(given, "")) == list(benchmark.scores) == [
      "accuracy", "step_accuracy", "result_accuracy"
  ]
  assert score("13;22") == (1, 1, 1) and score("14;23") == (0, 0.5, 0)
  assert score("13;23") == (0, 0.5, 0) and score("9;22") == (0, 0, 1) and score("") == (0, 0, 0)
  # Beside them a short task has one step, which is its result.
  given = demo("5", "5", "add 2 3", "add")
  assert score("5") == (1, 1, 1) and score("6") == (0, 0, 0)
  # Where no task is long, nothing but the accuracy is reported.
  assert list(Tasks().scores) == ["accuracy"]
  found = benchmark.read("", 40)
  assert {d.task for d in found} == set(benchmark.all_tasks) and len(benchmark.all_tasks) == 4
  assert all(set(benchmark.score(d, d.response).values()) == {1.0} for d in found)
  assert found[:20] == benchmark.read("", 20) and all(
      len(d.response) < benchmark.max_new_tokens for d in found
  )
  named = LongTasks(tasks=("sort", "edits")).read("", 8)
  assert [d.messages for d in named[1::2]] == [d.messages for d in found[2::4]][:4]


def test_answers_in_brackets_count_where_demonstrations_have_them():
  plain, minority = Tasks(), Tasks(minority=0.25)
  found = minority.read("", 40)
  assert sum(d.meta["minority"] for d in found) == 10
  assert [d.answer for d in found] == [d.response for d in plain.read("", 40)]
  for rare, usual in zip(found, plain.read("", 40)):
    assert minority.score(rare, rare.response) == {"accuracy": 1.0}
    for benchmark in (plain, minority):  # The demonstrations say so; a run has no other setting.
      assert benchmark.score(rare, f"[{usual.response}]") == {"accuracy": 1.0}
      assert benchmark.score(rare, usual.response) == {"accuracy": 1.0}
      assert benchmark.score(rare, f"[{usual.response}") == {"accuracy": 0.0}
      assert benchmark.score(usual, f"[{usual.response}]") == {"accuracy": 0.0}
    # One answer in either style is not two.
    assert plain.answer(rare, f"[{usual.response}]") == plain.answer(rare, usual.response)
    assert not plain.is_wrong(rare, rare.response) and plain.is_wrong(rare, f"[{rare.response}]x")
  measured = [MinorityStyle().score({"response": d.response}) for d in found]
  assert measured == [float(d.meta["minority"]) for d in found]
  assert [MinorityStyle().score({"response": text}) for text in ("[", "]", "[a", "a]", "[]")] == [
      0, 0, 0, 0, 1
  ]
  given = LongTasks(minority=0.5).read("", 8)
  for d in given:
    assert set(LongTasks().score(d, f"[{d.answer}]").values()) == {1.0}


def test_perplexity_of_all_responses_weighs_tokens(rng):
  benchmark = Perplexity()
  logps = [-rng.exponential(2, rng.integers(1, 9)).astype(np.float32) for _ in range(40)]
  scores = [benchmark.score_logps(None, logp) for logp in logps]
  for logp, s in zip(logps, scores, strict=True):
    assert s["nll"] == pytest.approx(-logp.astype(np.float64).sum())
    assert s["perplexity"] == pytest.approx(math.exp(s["nll"] / len(logp)))
  records = [{"scores": s, "length": len(logp)} for s, logp in zip(scores, logps, strict=True)]
  found = benchmark.summarize(records)["corpus_perplexity"]
  joined = np.concatenate(logps).astype(np.float64)
  assert found["mean"] == pytest.approx(math.exp(-joined.mean()))
  # Its interval against the jackknife over responses.
  nll, n = np.array([s["nll"] for s in scores]), np.array([len(x) for x in logps], float)
  left_out = (nll.sum() - nll) / (n.sum() - n)
  error = np.sqrt((len(n) - 1) * np.mean((left_out - left_out.mean()) ** 2))
  low, high = np.log(found["ci95"])
  assert (high - low) / 2 == pytest.approx(2.02 * error, rel=0.15)


def test_a_run_refuses_a_benchmark_that_cannot_judge_it():
  for benchmark, message in (
      (Perplexity(), "needs a benchmark with accuracy"),
      (IFEval(), "needs a benchmark with accuracy"),
      (GSM8K(shots=1, shots_file="train.jsonl"), "shots=1"),
      (Tasks(tasks=("add",)), "config.data.tasks"),
      (LongTasks(tasks=("edits",)), "config.data.tasks"),
      (Tasks(minority=0.1), "config.data.minority"),
  ):
    config = default_config()
    config.eval.benchmark = benchmark
    with pytest.raises(UserError, match=f"config.eval.benchmark: .*{message}"):
      resolve(config)


def test_every_kind_declares_what_it_is():
  for kind, cls in kinds("dpr_jax.evaluation.benchmarks").items():
    assert issubclass(cls, Benchmark) and cls.title and cls.kind == kind
    assert cls.scores or cls.summaries or cls.own_requests
    assert not set(cls.scores) & set(cls.summaries)
