"""One wrong token a response: what is replaced, and what the summary says of its rewards."""

import dataclasses
import itertools

import numpy as np
import pytest

from dpr_jax.data.demos import Demo
from dpr_jax.data.tasks import SHORT_TASKS, make_demos, verify
from dpr_jax.data.templates import encode_response, stop_ids
from dpr_jax.evaluation import corruption
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.benchmarks.exact import Exact
from dpr_jax.evaluation.benchmarks.gsm8k import GSM8K
from dpr_jax.evaluation.benchmarks.tasks import Tasks
from dpr_jax.evaluation.corruption import (
    corrupt_responses,
    corruption_records,
    judged_rewards,
    summarize,
)
from dpr_jax.evaluation.token_scores import TokenScores
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
  return byte_tokenizer()


def encode(demos, tokenizer):
  return [encode_response(d.response, d.prompt, tokenizer) for d in demos]


def file_demo(prompt, response):
  messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
  return Demo(messages, source="demos.jsonl:1")


def test_exactly_one_token_changes_and_the_answer_is_wrong(tokenizer, rng):
  demos = make_demos(tuple(SHORT_TASKS), 120, int(rng.integers(1_000)), split="heldout")
  responses, ends = encode(demos, tokenizer), stop_ids(tokenizer, {})
  found = corrupt_responses(demos, responses, tokenizer, ends, Tasks())
  assert len(found) > 100  # Hardly any answer has no wrong neighbour.
  for c in found:
    demo, right = demos[c.index], responses[c.index]
    changed = np.flatnonzero(c.tokens != right)
    assert list(changed) == [c.position] and right[c.position] == c.original
    assert c.tokens[-1] == right[-1] and int(c.tokens[-1]) in ends
    text = tokenizer.decode(c.tokens[:-1])
    assert not verify(demo.task, demo.messages[0]["content"], text)
    old, new = demo.response[c.position], text[c.position]
    if demo.task != "greet":  # Of the same kind: digits stay digits.
      assert (old.isdigit(), old.isupper()) == (new.isdigit(), new.isupper())
  places = {c.position for c in found}
  assert {0, 1, 2, 3} <= places
  again = corrupt_responses(demos, responses, tokenizer, ends, Tasks())
  assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))
  other = corrupt_responses(demos, responses, tokenizer, ends, Tasks(), seed=1)
  assert any(a.position != b.position for a, b in zip(found, other))


def test_in_a_file_the_words_differ(tokenizer):
  demos = [file_demo("a", "The cat"), file_demo("b", "CAT."), file_demo("c", "dog 7")]
  responses, ends = encode(demos, tokenizer), stop_ids(tokenizer, {})
  for seed in range(10):
    for c in corrupt_responses(demos, responses, tokenizer, ends, Exact(), seed=seed):
      text = tokenizer.decode(c.tokens[:-1])
      words = text.lower().replace(".", "").split()
      assert [w for w in words if w != "the"] != [
          w for w in demos[c.index].response.lower().replace(".", "").split() if w != "the"
      ]


def test_of_gsm8k_a_number_is_changed(tokenizer):
  demos = [file_demo("a", "so 12 and\n#### 34"), file_demo("b", "half of 90 is\n#### 45")]
  found = corrupt_responses(
      demos, encode(demos, tokenizer), tokenizer, stop_ids(tokenizer, {}), GSM8K()
  )
  assert len(found) == 2
  for c in found:
    assert tokenizer.decode([c.original]).isdigit()
    assert tokenizer.decode([int(c.tokens[c.position])]).isdigit()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Exact):
  """A benchmark of a user: right are all responses with the same last character."""

  corrupts_numbers = True

  def is_wrong(self, demo, text):
    return text[-1:] != demo.response[-1:]


def test_a_benchmark_of_a_user_says_what_is_corrupted_and_what_is_wrong(tokenizer):
  demos = [file_demo("a", "so 12 and 34"), file_demo("b", "half of 90 is 45")]
  found = corrupt_responses(
      demos, encode(demos, tokenizer), tokenizer, stop_ids(tokenizer, {}), Numbers()
  )
  assert len(found) == 2
  for c in found:
    text = tokenizer.decode(c.tokens[:-1])
    assert text[:-1] == demos[c.index].response[:-1] and text != demos[c.index].response
  own = Benchmark.is_wrong(Exact(), file_demo("a", "The cat"), "cat.")
  assert not own and Benchmark.is_wrong(Exact(), file_demo("a", "The cat"), "dog")


def test_a_response_that_cannot_be_wrong_is_left_out(tokenizer):
  demos = [file_demo("a", "aaa"), file_demo("b", "aaaa")]
  ends = stop_ids(tokenizer, {})
  assert not corrupt_responses(demos, encode(demos, tokenizer), tokenizer, ends, Exact())


def random_scores(rng, length):
  return TokenScores(*(rng.normal(size=length).astype(np.float32) for _ in range(3)))


def test_rewards_follow_their_definitions(rng):
  scores = [random_scores(rng, int(n)) for n in rng.integers(1, 7, 5)]
  found = corruption.token_rewards(scores)
  for i, s in enumerate(scores):
    np.testing.assert_allclose(found["baseline_relative"][i], s.logp_sft - s.logp_ref, atol=1e-6)
    np.testing.assert_allclose(found["log_likelihood"][i], s.logp_sft, atol=0)
    later = [*s.logsumexp_sft[1:], 0.0]  # Nothing follows the end.
    expected = s.logp_sft + s.logsumexp_sft - later
    np.testing.assert_allclose(found["endogenous"][i], expected, atol=1e-6)


def test_every_reward_that_log_probs_give_is_judged_the_main_one_first():
  assert list(judged_rewards()) == ["baseline_relative", "log_likelihood", "endogenous"]


def test_the_summary_can_be_recomputed_from_the_lines(tokenizer, rng):
  demos = make_demos(("add", "shuffle", "greet"), 30, 3, split="heldout")
  responses, ends = encode(demos, tokenizer), stop_ids(tokenizer, {})
  found = corrupt_responses(demos, responses, tokenizer, ends, Tasks())
  seeds = []
  for _ in range(2):
    scores = [[random_scores(rng, len(c.tokens)) for c in found] for _ in range(2)]
    seeds.append(corruption_records(demos, found, *scores, tokenizer, Tasks()))
  summary = summarize(seeds)
  assert set(summary) == {"all", "unique", "varied"}
  for kind, name in itertools.product(summary, judged_rewards()):
    areas, lowest, below, chance = [], [], [], []
    for records in seeds:
      chosen = [r for r in records if kind == "all" or kind in r["groups"]]
      wrong = [r["rewards"][name][r["position"]] for r in chosen]
      right = [x for r in chosen for x in r["rewards"][name][: r["position"]]]
      areas.append(np.mean([[a < b for b in right] for a in wrong]))
      later = [r for r in chosen if r["position"] > 0]
      lowest.append(np.mean([
          np.argmin(r["rewards"][name][: r["position"] + 1]) == r["position"] for r in later
      ]))
      chance.append(np.mean([1 / (r["position"] + 1) for r in later]))
      below.append(np.mean([
          r["rewards"][name][r["position"]] < r["original_rewards"][name] for r in chosen
      ]))
    values = summary[kind][name]
    if name != "baseline_relative":
      gain = summary[kind]["baseline_relative"]["auc"]["mean"] - np.mean(areas)
      assert values["auc_gain"]["mean"] == pytest.approx(gain, abs=1e-9)
    assert values["auc"]["mean"] == pytest.approx(np.mean(areas), abs=1e-9)
    assert values["lowest"]["mean"] == pytest.approx(np.mean(lowest), abs=1e-9)
    assert values["below_original"]["mean"] == pytest.approx(np.mean(below), abs=1e-9)
    assert summary[kind]["chance"] == pytest.approx(np.mean(chance), abs=1e-9)


def test_a_file_has_no_kinds(tokenizer, rng):
  demos = [file_demo("a", "one cat"), file_demo("b", "two dogs")]
  responses, ends = encode(demos, tokenizer), stop_ids(tokenizer, {})
  found = corrupt_responses(demos, responses, tokenizer, ends, Exact())
  scores = [random_scores(rng, len(c.tokens)) for c in found]
  records = corruption_records(demos, found, scores, scores, tokenizer, Exact())
  assert set(summarize([records])) == {"all"} and all(r["groups"] == [] for r in records)
