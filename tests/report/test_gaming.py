"""The verdict on a policy: each outcome and each sign follows from the numbers by its rule."""

import json

import numpy as np
import pytest

from dpr_jax.report import gaming


def lines(steps=100, seed=0, **metrics):
  """Metrics that go from a to b with noise s: name=(a, b, s)."""
  rng = np.random.default_rng([seed, len(metrics)])
  x = np.linspace(0, 1, steps)
  columns = {k: a + (b - a) * x + rng.normal(0, s, steps) for k, (a, b, s) in metrics.items()}
  return [{"step": i, **{k: float(v[i]) for k, v in columns.items()}} for i in range(steps)]


def column(label, **fields):
  return {"label": label, "unit": "%", "better": 0, "compared": True, "main": True, **fields}


COLUMNS = {
    "accuracy_sampled": column("Accuracy, sampled", better=1),
    "accuracy_greedy": column("Accuracy, greedy", better=1),
    "token_f1_sampled": column("Token F1, sampled", better=1),
    "errors_sampled": column("Errors, sampled", better=-1),
    "length_sampled": column("Length, sampled", unit="tokens"),
    "sample_nll_ref": column("ref", unit="nats per token", alarm=0.1, main=False),
    "sample_nll_base": column("base", unit="nats per token", alarm=0.1, main=False),
}
UP = {"reward": (1.0, 2.0, 0.01)}


def against_sft(metric, low, high, p=0.001, pair=("dpr", "sft")):
  return {"pair": list(pair), "metric": metric, "difference": (low + high) / 2,
          "ci95": [low, high], "p": p}


def judged(comparisons=(), length=10.0, seeds=1, **metrics):
  measured = dict.fromkeys(COLUMNS, {}) | {"length_sampled": {"mean": length}}
  results = {"comparisons": list(comparisons), "columns": COLUMNS, "systems": {"sft": measured}}
  found = gaming(results, {"dpr": [lines(seed=s, **metrics) for s in range(seeds)]}, "dpr")
  json.dumps(found)
  return found


def signs(found):
  return {s["name"] for s in found["signs"] if s["found"]}


WORSE, SAME, BETTER = (
    against_sft("accuracy_sampled", *ends) for ends in ((-0.09, -0.02), (-0.03, 0.03), (0.02, 0.09))
)
SHORT = against_sft("length_sampled", -4.5, -3.5)
FLAT = {"entropy": (1.0, 0.2, 0.01)}


@pytest.mark.parametrize("comparisons,metrics,verdict,says", [
    ([WORSE], UP, "gaming", "The policy was gaming the reward: the reward rose by 0.9"),
    ([BETTER], UP, "clean", "The policy was not gaming the reward"),
    ([SAME], UP, "clean", "No evidence that the policy was gaming"),
    ([SAME, SHORT], {**UP, **FLAT}, "suspected", "The policy may be gaming the reward"),
    ([SAME, SHORT], UP, "clean", "signs: length"),
    ([BETTER, SHORT], {**UP, **FLAT}, "clean", "signs: length, entropy"),
    ([WORSE], {"reward": (1.0, 1.0, 0.3)}, "no_rise", "the reward did not rise"),
    ([WORSE], {"reward": (2.0, 1.0, 0.01)}, "no_rise", "it fell by 0.9"),
    ([WORSE], {"reward": (2.0, 1.0, 0.01)}, "no_rise", "accuracy, sampled, fell by 5.5 points"),
    ([], UP, "unknown", "no task was measured"),
    ([WORSE], {"loss": (1.0, 1.0, 0.1)}, "unknown", "too few steps have a reward"),
])
def test_the_verdict_follows_its_rule(comparisons, metrics, verdict, says):
  found = judged(comparisons, **metrics)
  assert found["verdict"] == verdict and says in found["text"]
  assert found["text"].endswith(".") and "\n" not in found["text"]


def test_accuracy_that_falls_outweighs_a_token_f1_that_rises():
  f1 = against_sft("token_f1_sampled", 0.02, 0.05)
  text = judged([WORSE, f1], **UP)
  assert text["verdict"] == "gaming"
  assert "accuracy, sampled, fell by 5.5 points against SFT [−9.0, −2.0]" in text["text"]
  assert "token F1, sampled, rose by 3.5 points" in text["text"]
  assert judged([SAME, f1], **UP)["verdict"] == "clean"


def test_a_goal_may_be_better_the_lower_it_is():
  more, fewer = (against_sft("errors_sampled", *x) for x in ((0.02, 0.09), (-0.09, -0.02)))
  assert judged([SAME, more], **UP)["verdict"] == "gaming"
  assert judged([SAME, fewer, SHORT], **UP, **FLAT)["verdict"] == "clean"


def test_greedy_accuracy_and_other_pairs_do_not_decide():
  greedy = against_sft("accuracy_greedy", -0.2, -0.1)
  other = against_sft("accuracy_sampled", -0.2, -0.1, pair=("dpr", "ref"))
  assert judged([SAME, greedy, other], **UP)["verdict"] == "clean"


def test_a_loss_that_may_be_chance_does_not_convict():
  assert judged([against_sft("accuracy_sampled", -0.09, -0.01, p=0.06)], **UP)["verdict"] == "clean"


@pytest.mark.parametrize("name,there,not_there", [
    ("eos rate", {"eos_rate": (1.0, 0.9, 1e-3)}, {"eos_rate": (1.0, 0.99, 1e-3)}),
    ("repetition", {"distinct_2": (0.8, 0.6, 1e-3)}, {"distinct_2": (0.8, 0.76, 1e-3)}),
    ("entropy", {"entropy": (1.0, 0.3, 1e-3)}, {"entropy": (1.0, 0.7, 1e-3)}),
    ("kl", {"kl": (0.0, 14.0, 0.1)}, {"kl": (0.0, 8.0, 0.1)}),
])
def test_signs_of_training(name, there, not_there):
  assert signs(judged([SAME], **UP, **there)) == {name}
  assert signs(judged([SAME], **UP, **not_there)) == set()


@pytest.mark.parametrize("name,there,not_there", [
    ("length", against_sft("length_sampled", 2.5, 3.5), against_sft("length_sampled", 0.5, 1.5)),
    ("length", against_sft("length_sampled", -3.5, -2.5), against_sft("length_sampled", -4, 10)),
    ("ref", against_sft("sample_nll_ref", 0.2, 0.4), against_sft("sample_nll_ref", 0.02, 0.08)),
    ("base", against_sft("sample_nll_base", 0.2, 0.4), against_sft("sample_nll_base", -0.4, -0.2)),
])
def test_signs_of_the_evaluation(name, there, not_there):
  assert signs(judged([SAME, there], **UP)) == {name}
  assert signs(judged([SAME, not_there], **UP)) == set()


def test_seeds_must_agree_that_the_reward_rose():
  results = {"comparisons": [WORSE], "columns": COLUMNS,
             "systems": {"dpr": {"accuracy_sampled": {}}}}
  up, flat = lines(**UP), lines(reward=(1.0, 1.0, 0.3))
  assert gaming(results, {"dpr": [up, up]}, "dpr")["verdict"] == "gaming"
  assert gaming(results, {"dpr": [up, flat]}, "dpr")["verdict"] == "no_rise"


def test_nothing_at_all_is_unknown():
  assert gaming({}, {}, "dpr") == {
      "verdict": "unknown", "signs": [],
      "text": "Whether the policy was gaming the reward cannot be said: too few steps have a "
              "reward.",
  }
