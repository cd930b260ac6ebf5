"""Monitors: sentences whose numbers and verdicts follow from the metrics."""

import numpy as np
import pytest

from dpr_jax.report.monitors import Trend, change, monitors


def lines(steps=100, **metrics):
  """Metrics that go from a to b with noise s: name=(a, b, s)."""
  rng = np.random.default_rng(len(metrics))
  x = np.linspace(0, 1, steps)
  columns = {k: a + (b - a) * x + rng.normal(0, s, steps) for k, (a, b, s) in metrics.items()}
  return [{"step": i, **{k: float(v[i]) for k, v in columns.items()}} for i in range(steps)]


COLUMNS = {"accuracy_sampled": {"label": "Accuracy, sampled", "unit": "%", "better": 1,
                                "compared": True, "main": True}}


def said(stages, **results):
  return {m["name"].partition(": ")[2]: m for m in monitors(stages, results)}


def dpr(**metrics):
  return said({"dpr": [lines(**{"reward": (1.0, 1.5, 0.01), **metrics})]})


def test_change_is_the_difference_of_the_tenths():
  values = np.random.default_rng(0).normal(size=200)
  got = change(values.tolist())
  assert got.start == pytest.approx(values[:20].mean())
  assert got.end == pytest.approx(values[-20:].mean())
  error = np.sqrt((values[:20].var(ddof=1) + values[-20:].var(ddof=1)) / 20)
  assert got.error == pytest.approx(error)
  assert change([1.0, 2.0, 3.0]) is None
  assert change([1.0, float("nan"), 2.0, None, 3.0, "4", 4.0]).start == 1.5


def test_noise_alone_seldom_moves():
  rng = np.random.default_rng(1)
  moved = np.mean([change(rng.normal(size=300).tolist()).moved for _ in range(1_000)])
  assert moved == pytest.approx(0.05, abs=0.025)


def test_constants_do_not_move():
  assert not change([0.1 + 0.2] * 20).moved and not change([0.0] * 20).moved
  assert change([0.0] * 20 + [1.0] * 20).moved


def test_reward_and_length_in_one_sentence():
  found = dpr(response_length=(6.0, 8.0, 0.01), reward_per_token=(1 / 6, 1.5 / 8, 0.0001))
  text = found["reward and length"]["text"]
  assert text.startswith("Reward rose by 0.45 nats per response, from 1.0")
  assert "response length rose by 1.8 tokens, from 6.1 to 7.9." in text
  assert found["reward and length"]["status"] == "note"


def test_a_reward_that_only_grows_longer_is_flagged():
  found = dpr(response_length=(6.0, 9.0, 0.01), reward_per_token=(1 / 6, 1 / 6.2, 0.0001))
  assert found["reward and length"]["status"] == "watch"
  assert "longer responses, not from better tokens" in found["reward and length"]["text"]


def test_nothing_moved_is_said_so():
  found = said({"dpr": [lines(reward=(1.0, 1.0, 0.3), response_length=(6.0, 6.0, 0.2))]})
  assert found["reward and length"]["text"].count("stayed within noise") == 2


def test_kl_with_the_objective():
  found = said(
    {"dpr": [lines(reward=(1.0, 1.5, 0.01), kl=(0.0, 0.4, 0.01), shaped_reward=(1.0, 1.3, 0.01),
                   beta=(0.5, 0.5, 0.0))]},
  )
  assert found["KL to SFT"]["status"] == "note" and "(beta = 0.5)" in found["KL to SFT"]["text"]
  steered = dpr(kl=(0.0, 0.4, 0.01), shaped_reward=(1.0, 1.3, 0.01), beta=(0.5, 0.7, 0.0))
  assert "beta" not in steered["KL to SFT"]["text"]
  assert dpr(kl=(0.0, 30.0, 0.1))["KL to SFT"]["status"] == "watch"
  falls = dpr(kl=(0.0, 1.0, 0.01), shaped_reward=(1.0, 0.5, 0.01))
  assert falls["KL to SFT"]["status"] == "watch"


@pytest.mark.parametrize("low, high, p, status, text", [
  (0.01, 0.05, 0.01, "note", "a gain."),
  (-0.02, 0.05, 0.4, "note", "which may be 0."),
  (0.01, 0.05, 0.06, "note", "which may be 0."),
  (-0.09, -0.02, 0.001, "watch", "mark of a gamed reward"),
])
def test_the_reward_is_held_against_the_task(low, high, p, status, text):
  c = {"pair": ["dpr", "sft"], "metric": "accuracy_sampled", "difference": (low + high) / 2,
       "ci95": [low, high], "p": p}
  other = {**c, "pair": ["sft", "ref"], "ci95": [0.3, 0.4]}
  results = {"comparisons": [other, c], "columns": COLUMNS, "labels": {"mine": "My policy"},
             "systems": {"mine": {"accuracy_sampled": {}}}}
  c["pair"][0] = "mine"  # of any policy that has a reward.
  found = said({"mine": [lines(reward=(1.0, 1.5, 0.01))]}, **results)
  assert found["reward against the task"]["status"] == status
  assert text in found["reward against the task"]["text"]


@pytest.mark.parametrize("metrics, name", [
  ({"eos_rate": (1.0, 0.9, 0.001)}, "stopping"),
  ({"eos_rate": (0.5, 0.5, 0.001)}, "stopping"),
  ({"entropy": (1.0, 0.2, 0.01)}, "variety"),
  ({"sft_logp": (-0.5, -0.9, 0.01), "ref_logp": (-0.5, -1.0, 0.01)}, "likelihood of the samples"),
  ({"decode_gap": (3.0, 3.0, 0.0)}, "sampling and scoring agree"),
])
def test_what_deserves_a_second_look(metrics, name):
  assert dpr(**metrics)[name]["status"] == "watch"


@pytest.mark.parametrize("metrics, name", [
  ({"eos_rate": (0.995, 0.985, 0.001)}, "stopping"),
  ({"entropy": (1.0, 0.8, 0.01)}, "variety"),
  ({"sft_logp": (-0.5, -0.4, 0.01), "ref_logp": (-0.5, -0.6, 0.01)}, "likelihood of the samples"),
  ({"decode_gap": (1e-6, 1e-6, 0.0), "on_policy_drift": (0.0, 0.0, 1e-8)},
   "sampling and scoring agree"),
])
def test_what_is_as_it_should_be(metrics, name):
  assert dpr(**metrics)[name]["status"] == "note"


def test_supervised_stages_and_stages_of_others():
  falls, rises = lines(loss=(3.0, 1.0, 0.01)), lines(loss=(1.0, 2.0, 0.01))
  found = [(m["name"], m["status"])
           for m in monitors({"sft": [falls], "spin": [rises]}, {"labels": {"sft": "SFT"}})]
  assert found == [("SFT: loss", "note"), ("spin: loss", "watch")]
  assert monitors({"sft": [[]]}, {}) == [] and monitors({}, {}) == []


def test_seeds_must_agree():
  up, flat = change([0.0] * 20 + [1.0] * 20), change([0.5, 0.6] * 20)
  assert Trend((up, up)).direction == 1
  assert Trend((up, flat)).direction == 0
  assert "moved in 1 of 2 seeds" in Trend((up, flat)).phrase()
  assert Trend((up, change([1.0] * 20 + [0.0] * 20))).direction == 0
  assert Trend((up, change([1.0] * 20 + [3.0] * 20))).phrase("tokens", 1) == (
    "rose by 1.5 tokens, from 0.5 to 2.0"
  )


def test_lines_that_are_not_finite_are_counted():
  rows = lines(loss=(3.0, 1.0, 0.01))
  rows[4]["loss"] = float("nan")
  rows[7]["grad_norm"] = float("inf")
  assert "2 of 100 lines" in said({"sft": [rows]})["not finite"]["text"]
