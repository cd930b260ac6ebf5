"""IFEval scores as its library does, which asks nobody for a model of sentences."""

import json
import pathlib
import random
import subprocess
import sys

import pytest

from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.ifeval import IFEval, library

pytest.importorskip("if_verifiable")

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
PROMPTS = [
    ("Six sentences.", {"length_constraints:number_sentences":
                        {"relation": "at least", "num_sentences": 3}}),
    ("Shout twice, without commas.", {"change_case:capital_word_frequency":
                                      {"capital_relation": "at least", "capital_frequency": 2},
                                      "punctuation:no_comma": {}}),
    ("Wrap it in quotes.", {"startend:quotation": {}}),
]
RESPONSES = [
    "Dr. Smith went home at 5 p.m. on Monday. He was tired. \"Why?\" I asked.",
    "OK THEN, here we GO\nand *ON* it goes.",
    "\"Quoted.\"",
    "Sure:\n\"Quoted.\"",
    "",
    "<think>\"a\"</think>\"Quoted.\"",
]


@pytest.fixture
def data(tmp_path):
  path = tmp_path / "input_data.jsonl"
  records = [
      {"key": i, "prompt": prompt, "instruction_id_list": list(asked), "kwargs": [*asked.values()]}
      for i, (prompt, asked) in enumerate(PROMPTS)
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def by_the_library(demos, texts, monkeypatch):
  """Its scores, with the sentences of NLTK's own code, and NLTK's own words."""
  import nltk
  import punkt
  from if_verifiable.ifeval import instructions, instructions_util
  from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

  theirs, model = PunktParameters(), punkt.load_model("english")
  for name in ("abbrev_types", "collocations", "sent_starters"):
    setattr(theirs, name, set(getattr(model, name)))
  theirs.ortho_context.update(model.ortho_context)
  sentences = PunktSentenceTokenizer(theirs)
  monkeypatch.setattr(instructions_util, "nltk", nltk)
  monkeypatch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: sentences)
  monkeypatch.setattr(nltk.tokenize, "_get_punkt_tokenizer", lambda language: sentences)
  monkeypatch.setattr(instructions, "random", random)
  found = []
  for demo, text in zip(demos, texts, strict=True):
    random.seed(0)
    found.append(library().evaluate_output_for_sample("ifeval", demo.meta["sample"], text))
  return found


def check(demos, texts, monkeypatch):
  """Compares our scores and their sums with the library's; returns ours."""
  benchmark = IFEval()
  ours = [benchmark.score(demo, text) for demo, text in zip(demos, texts, strict=True)]
  theirs = by_the_library(demos, texts, monkeypatch)
  followed = {"strict": 0, "loose": 0}
  for mine, (results, scores) in zip(ours, theirs, strict=True):
    for mode in followed:
      assert mine[f"prompt_{mode}"] == getattr(scores, f"binary_{mode}")
      assert mine[f"followed_{mode}"] == pytest.approx(
          getattr(scores, f"partial_{mode}") * mine["instructions"])
      followed[mode] += sum(getattr(x, f"{mode}_pass") for x in results)
  found = benchmark.summarize([{"sample": 0, "scores": s} for s in ours])
  total = sum(len(d.meta["sample"].instruction_id_list) for d in demos)
  for mode in followed:
    assert found[f"instruction_{mode}"]["mean"] == followed[mode] / total
  return ours


def test_scores_are_those_of_the_library(data, monkeypatch):
  demos = [demo for demo in IFEval().read(data) for _ in RESPONSES]
  found = check(demos, RESPONSES * len(PROMPTS), monkeypatch)
  strict, loose = ([s[f"prompt_{mode}"] for s in found] for mode in ("strict", "loose"))
  # Abbreviations end no sentence, and an empty response follows nothing. Loose, each instruction
  # may be followed by another part of a response.
  assert strict == [1, 0, 0, 0, 0, 0] + [0, 0, 0, 0, 0, 0] + [0, 0, 1, 0, 0, 1]
  assert loose == [1, 0, 0, 0, 0, 0] + [0, 1, 0, 0, 0, 0] + [0, 0, 1, 1, 0, 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the prompts of IFEval")
def test_scores_of_real_responses_are_those_of_the_library(monkeypatch):
  demos = IFEval().read(SHARED / "ifeval" / "input_data.jsonl")
  assert len(demos) == 541 and sum(len(d.meta["sample"].kwargs) for d in demos) == 834
  answers = json.loads(
      (SHARED / "alpaca_eval" / "outputs_gpt-3.5-turbo-1106.json").read_text())
  found = check(demos[:120], [a["output"] for a in answers[:120]], monkeypatch)
  assert 0 < sum(s["prompt_strict"] for s in found) < sum(s["prompt_loose"] for s in found)


def test_what_the_library_decides_by_chance_does_not_vary(tmp_path):
  path = tmp_path / "input_data.jsonl"
  path.write_text(json.dumps({
      "prompt": "Shout.", "instruction_id_list": ["keywords:letter_frequency"],
      "kwargs": [{"letter": "!", "let_frequency": 2, "let_relation": "at least"}],
  }))
  (demo,) = IFEval().read(path)
  of_library = lambda: library().evaluate_output_for_sample(
      "ifeval", demo.meta["sample"], RESPONSES[0])[1].binary_strict
  assert len({of_library() for _ in range(100)}) == 2
  assert len({IFEval().score(demo, RESPONSES[0])["prompt_strict"] for _ in range(100)}) == 1


def test_samples_of_a_prompt_are_averaged_first():
  score = lambda followed, n: {"followed_strict": followed, "followed_loose": n, "instructions": n}
  records = [{"sample": s, "scores": score(*x)} for s, x in ((0, (1, 2)), (1, (2, 2)), (0, (0, 3)),
                                                             (1, (1, 3)))]
  found = IFEval().summarize(records)["instruction_strict"]
  assert found["mean"] == pytest.approx((1.5 + 0.5) / (2 + 3)) and found["n"] == 2


def test_nothing_is_downloaded_and_scores_do_not_vary(data):
  program = """
import json, socket, sys
def refuse(*args, **kwargs):
  raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
from dpr_jax.evaluation.benchmarks.ifeval import IFEval
demos = IFEval().read(sys.argv[1])
print(json.dumps([IFEval().score(d, t) for d in demos for t in json.loads(sys.argv[2])]))
assert "torch" not in sys.modules
"""
  command = [sys.executable, "-c", program, str(data), json.dumps(RESPONSES)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
  assert json.loads(done.stdout) == [
      IFEval().score(d, t) for d in IFEval().read(data) for t in RESPONSES
  ]


GOOD = {"prompt": "p", "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["a"]}]}
BAD = {
    "another format": ({"messages": []}, r"input.jsonl:2: no prompt of IFEval; expected"),
    "no kwargs": ({**GOOD, "kwargs": []}, "no prompt of IFEval"),
    "unknown": ({**GOOD, "instruction_id_list": ["a:b"]}, "instruction_id_list has 'a:b'; known"),
    # The library would choose one by chance.
    "missing": ({**GOOD, "kwargs": [{}]}, "kwargs of keywords:existence lack keywords"),
    "other": ({**GOOD, "kwargs": [{"num_words": 3}]}, "kwargs of keywords:existence: "),
    "value": ({"prompt": "p", "instruction_id_list": ["length_constraints:number_words"],
               "kwargs": [{"num_words": 3, "relation": "about"}]}, "number_words: The supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
  record, message = BAD[case]
  path = tmp_path / "input.jsonl"
  path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(record)}\n")
  with pytest.raises(UserError, match=message) as found:
    IFEval().read(path)
  assert f"{path}:2" in str(found.value)
