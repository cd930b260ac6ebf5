"""Tables: values in their units, marks no stronger than interval and p."""

import pytest

from dpr_jax.report import tables
from dpr_jax.report.render import count, duration, number, significant, visible


def entry(mean, low, high, n=200):
  return {"mean": mean, "ci95": [low, high], "n": n}


def comparison(a, b, difference, low, high, p, metric="accuracy_sampled"):
  return {"pair": [a, b], "metric": metric, "difference": difference, "ci95": [low, high], "p": p}


RESULTS = {
  "systems": {
    "sft": {"accuracy_sampled": entry(0.7, 0.6, 0.8), "length_sampled": entry(6.04, 5.9, 6.2),
            "length_greedy": entry(5.9, 5.8, 6.0),
            "accuracy_sampled/add": entry(0.5, 0.3, 0.7, 20)},
    "low_temperature": {"accuracy_sampled": entry(0.75, 0.65, 0.84)},
    "dpr": {"accuracy_sampled": entry(0.8, 0.7, 0.9, 100), "heldout_nll": entry(7.0, 6.0, 8.0),
            "accuracy_sampled/varied": entry(0.6, 0.5, 0.7),
            "accuracy_sampled/add": entry(0.9, 0.7, 0.97, 20)},
  },
  "comparisons": [
    comparison("dpr", "sft", 0.1, 0.02, 0.18, 0.01),
    comparison("sft", "low_temperature", -0.05, -0.09, -0.01, 0.02),
    comparison("dpr", "continued_sft", 0.03, -0.02, 0.08, 0.2),
  ],
}


def test_results_in_their_units_and_order():
  table = tables.results_table(RESULTS)
  assert [(c["label"], c["unit"]) for c in table["columns"]] == [
    ("Accuracy, sampled", "%"), ("Accuracy, sampled, many right answers", "%"),
    ("Length, sampled", "tokens"), ("Held-out NLL", "nats"),
  ]
  sft, low, dpr = table["rows"]
  assert [sft["name"], low["name"], dpr["name"]] == ["SFT", "SFT, low temperature", "DPR"]
  assert (sft["cells"][0]["mean"], sft["cells"][0]["ci"]) == ("70.0", "60.0 – 80.0")
  assert (sft["cells"][2]["mean"], sft["cells"][2]["ci"]) == ("6.0", "5.9 – 6.2")
  assert low["cells"][3]["mean"] == "–"


def test_distances_to_an_expert_are_shown_where_they_are_known():
  assert not tables.results_table(RESULTS)["expert"]
  known = {"reverse_kl": entry(1.234, 1, 2), "forward_kl": entry(2, 1, 3),
           "expert_logp": entry(-0.5, -1, 0)}
  table = tables.results_table({"systems": {"sft": known}})
  assert table["expert"]
  assert [(c["label"], c["unit"]) for c in table["columns"]] == [
    ("KL(system || expert)", "nats"), ("KL(expert || system)", "nats"),
    ("Log p under the expert, a token", "nats"),
  ]
  assert [c["mean"] for c in table["rows"][0]["cells"]] == ["1.23", "2.00", "−0.50"]


def test_n_is_said_once_where_it_is_the_same():
  table = tables.results_table(RESULTS)
  assert table["columns"][0]["n"] == "" and table["columns"][2]["n"] == "200"
  assert [row["cells"][0]["n"] for row in table["rows"]] == ["200", "200", "100"]


def test_marks_follow_the_pair_in_either_order():
  rows = tables.results_table(RESULTS)["rows"]
  assert [row["cells"][0]["sign"] for row in rows] == [0, 1, 1]
  assert all(c["sign"] == 0 for row in rows for c in row["cells"][1:])


@pytest.mark.parametrize("low, high, p, sign", [
  (0.1, 0.2, 0.01, 1), (-0.2, -0.1, 0.01, -1), (-0.1, 0.1, 0.5, 0), (0.001, 0.2, 0.054, 0),
  (0.0, 0.2, 0.04, 0), (0.1, 0.2, None, 1), (float("nan"), float("nan"), 0.01, 0),
])
def test_a_difference_counts_only_if_interval_and_p_agree(low, high, p, sign):
  assert tables.resolved({"ci95": [low, high], "p": p}) == sign


def test_comparisons_are_points_and_drawn_to_scale():
  rows = tables.comparisons_table(RESULTS)
  assert (rows[0]["a"], rows[0]["b"], rows[0]["unit"]) == ("DPR", "SFT", "points")
  assert rows[0]["difference"] == "+10.0" and rows[0]["ci"] == "[+2.0, +18.0]"
  assert rows[1]["difference"] == "−5.0" and rows[1]["sign"] == -1
  for row in rows:
    bar = row["bar"]
    assert 0 <= bar["low"] <= bar["at"] <= bar["high"] <= 100
    assert (bar["low"] > 50) == (row["ci"][1] == "+")
  assert rows[2]["bar"]["low"] < 50 < rows[2]["bar"]["high"]


def test_tasks_are_split_from_kinds():
  (table,) = tables.task_tables(RESULTS)
  assert table["title"] == "Accuracy, sampled" and table["columns"] == ["SFT", "DPR"]
  assert [(r["name"], r["n"]) for r in table["rows"]] == [("add", "20")]
  assert [c["label"] for c in tables.more_metrics(RESULTS)["columns"]] == ["Length, greedy"]


def test_the_headline_claims_no_more_than_its_intervals():
  text = tables.headline(RESULTS)
  assert text == (
    "DPR answers 80.0% of held-out prompts right when sampled: +10.0 points against SFT "
    "[+2.0, +18.0]; +3.0 points against Continued SFT [−2.0, +8.0], which may be 0."
  )
  assert tables.headline({"systems": {"sft": {}}}) == "" and tables.headline({}) == ""


def test_nothing_measured_makes_no_tables():
  assert tables.results_table({}) is None and tables.more_metrics({}) is None
  assert tables.comparisons_table({}) == [] and tables.task_tables({}) == []


def test_numbers_as_they_are_read():
  assert number(-1234.567, 1) == "−1,234.6" and number(-0.0004, 2, sign=True) == "0.00"
  assert number(None) == number(float("nan")) == number(True) == "–"
  assert significant(0.012345) == "0.0123" and significant(3.1e-6, 2) == "3.1 × 10⁻⁶"
  assert tables.p_value(0.0004) == "< 0.001" and tables.p_value(0.0316) == "0.032"
  assert [duration(s) for s in (5, 59.4)] == ["5.0 s", "59 s"]
  assert [duration(s) for s in (200, 7_500)] == ["3 min 20 s", "2 h 05 min"]
  assert count(1234) == "1,234" and count(8.03e9) == "8.03 billion"
  assert visible(" a\tb \n\x1b") == "·a\tb \n\\x1b" and visible("  ") == "··"
