"""Tables: values in their units, marks no stronger than interval and p."""

import pytest

from dpr_jax.report import frontier, tables
from dpr_jax.report.render import count, duration, number, significant, visible


def entry(mean, low, high, n=200):
  return {"mean": mean, "ci95": [low, high], "n": n}


def comparison(a, b, difference, low, high, p, metric="accuracy_sampled"):
  return {"pair": [a, b], "metric": metric, "difference": difference, "ci95": [low, high], "p": p}


def columns(**changed):
  """Of each metric here, as `evaluation.metrics.Column` has them."""
  shares = {"unit": "%", "better": 1, "compared": True}
  found = {
    "accuracy_sampled": {"label": "Accuracy, sampled", "main": True, **shares},
    "accuracy_sampled/add": {"label": "Accuracy, sampled, add", "main": False, **shares},
    "accuracy_sampled/varied": {"label": "Accuracy, sampled, many right answers", "main": True,
                                **shares},
    "length_sampled": {"label": "Length, sampled", "unit": "tokens", "main": True},
    "length_greedy": {"label": "Length, greedy", "unit": "tokens"},
    "heldout_nll": {"label": "Held-out NLL", "unit": "nats per response", "better": -1,
                    "main": True, "note": "It rises by design."},
  }
  return {m: {**c, **changed.get(m, {})} for m, c in found.items()}


RESULTS = {
  "labels": {"sft": "SFT", "low_temperature": "SFT, low temperature", "dpr": "DPR",
             "continued_sft": "Continued SFT"},
  "columns": columns(), "main": "dpr", "stages": {"sft": {}, "continued_sft": {}, "dpr": {}},
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
    ("Length, sampled", "tokens"), ("Held-out NLL", "nats per response"),
  ]
  assert table["note"] == "It rises by design."
  sft, low, dpr = table["rows"]
  assert [sft["name"], low["name"], dpr["name"]] == ["SFT", "SFT, low temperature", "DPR"]
  assert (sft["cells"][0]["mean"], sft["cells"][0]["ci"]) == ("70.0", "60.0 – 80.0")
  assert (sft["cells"][2]["mean"], sft["cells"][2]["ci"]) == ("6.0", "5.9 – 6.2")
  assert low["cells"][3]["mean"] == "–"


def test_a_metric_in_a_unit_of_its_own():
  words = {"words_sampled": {"label": "Words, sampled", "unit": "words", "main": True}}
  results = {"systems": {"sft": {"words_sampled": entry(12.345, 11, 13)}}, "columns": words}
  table = tables.results_table(results)
  assert (table["columns"][0]["label"], table["columns"][0]["unit"]) == ("Words, sampled", "words")
  assert table["rows"][0]["cells"][0]["mean"] == "12.3"
  assert tables.show(-0.5, "words", sign=True) == "−0.500"
  unknown = tables.more_metrics({**results, "columns": {}})
  assert [c["label"] for c in unknown["columns"]] == ["words sampled"]


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


def test_groups_of_prompts_have_a_table_those_with_names_last():
  (table,) = tables.task_tables(RESULTS)
  assert table["title"] == "Accuracy, sampled (%)" and table["columns"] == ["SFT", "DPR"]
  assert [(r["name"], r["n"]) for r in table["rows"]] == [
    ("add", "20"), ("many right answers", "200")
  ]
  assert [c["label"] for c in tables.more_metrics(RESULTS)["columns"]] == ["Length, greedy"]


def test_the_headline_claims_no_more_than_its_intervals():
  assert tables.headline(RESULTS) == (
    "Accuracy, sampled: DPR reaches 80.0%. It is better than SFT (+10.0 points [+2.0, +18.0]). It "
    "cannot be told apart from Continued SFT (+3.0 points [−2.0, +8.0])."
  )
  assert tables.headline({"systems": {"sft": {}}}) == "" and tables.headline({}) == ""
  # The same numbers, of something that is better the lower it is.
  lower = {**RESULTS, "columns": columns(accuracy_sampled={"better": -1, "label": "Errors"})}
  assert tables.headline(lower).startswith("Errors: DPR reaches 80.0%. It cannot be told apart")
  assert "It is worse than SFT (+10.0 points" in tables.headline(lower)


def frontier_of(low, high, p=0.01, **more):
  gap = {"difference": (low + high) / 2, "ci95": [low, high], "p": p}
  point = {"temperature": 1.0, "accuracy": entry(0.5, 0.4, 0.6), "coverage": entry(1.5, 1.2, 1.8),
           "pass_at_k": entry(0.7, 0.6, 0.8)}
  greedy = {**point, "temperature": 0.0, "accuracy": entry(0.9, 0.8, 1.0)}
  return {**RESULTS, "frontier": {
    "k": 8, "prompts": 128, "temperatures": [1.0, 0.0],
    "curves": {"sft": [point, greedy], "dpr": [point, greedy]},
    "equal_accuracy": {"dpr": gap}, "equal_coverage": {"dpr": {**gap, "coverage": [1, 2]}},
    "equal_temperature": {"dpr": {"temperature": 1.0, "accuracy": gap, "coverage": gap}}, **more,
  }}


@pytest.mark.parametrize("low,high,p,claim,cost", [
  (0.1, 0.3, 0.01, "DPR does more than a lower temperature of SFT would", "of DPR grew"),
  (-0.1, 0.3, 0.4, "DPR is not shown to do more than a lower", "is not shown to have changed"),
  (0.1, 0.3, 0.06, "DPR is not shown to do more than a lower", "is not shown to have changed"),
  (-0.3, -0.1, 0.01, "A lower temperature of SFT does better than DPR", "of DPR shrank"),
])
def test_the_frontier_claims_no_more_than_its_interval(low, high, p, claim, cost):
  first, second = frontier.sentences(frontier_of(low, high, p))
  gap = f"{tables.show((low + high) / 2, 'answers', sign=True)} distinct right answers in 8 samples"
  assert first.startswith(claim) and f"at equal accuracy, {gap} against SFT [" in first
  assert cost in second and f"at temperature 1, {gap} against SFT [" in second


def test_an_unknown_difference_has_its_reason():
  unknown = {"difference": None, "reason": "no such range"}
  results = frontier_of(0.1, 0.2, equal_accuracy={"dpr": unknown}, equal_temperature={})
  assert frontier.sentences(results) == [
    "DPR does more than a lower temperature of SFT would: at equal coverage, +15.0 points of "
    "accuracy against SFT [+10.0, +20.0]."
  ]
  results["frontier"]["equal_coverage"] = {"dpr": unknown}
  assert frontier.sentences(results) == [
    "Whether DPR does more than a lower temperature of SFT would cannot be said: no such range."
  ]
  assert frontier.table(results)["rows"][1]["cells"][3]["why"] == "no such range"
  assert frontier.sentences(RESULTS) == [] and frontier.table(RESULTS) is None
  assert frontier.series(RESULTS) == {}


def test_the_frontier_as_a_table_and_as_curves():
  table = frontier.table(frontier_of(0.1, 0.3))
  assert [r["name"] for r in table["rows"]] == ["SFT", "DPR"] and table["marked"]
  assert [c["mean"] for c in table["rows"][1]["cells"]] == [
    "50.0", "1.50", "70.0", "+0.20", "+20.0", "+0.20"
  ]
  assert [c["mean"] for c in table["rows"][0]["cells"][3:]] == ["–"] * 3
  series = frontier.series(frontier_of(0.1, 0.3))
  assert list(series) == ["DPR", "SFT"] and series["SFT"] == [(1.0, 0.5, 1.5), (0.0, 0.9, 1.5)]


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
