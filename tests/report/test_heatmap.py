"""Heatmaps: a diverging scale that is symmetric, values in reach, nothing hidden."""

import re

import numpy as np
import pytest

from dpr_jax.report import write_heatmap
from dpr_jax.report.heatmap import MAX_TOKENS, colour, heatmap_view, limit


def row(tokens, rewards, **more):
  return {"prompt": "p", "response": "".join(tokens), "tokens": tokens, "token_rewards": rewards,
          "reward": sum(rewards), **more}


def opacity(css):
  return float(re.fullmatch(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", css)[1])


def test_the_scale_is_symmetric_and_monotone():
  rewards = np.linspace(0, 2, 21)
  up, down = ([opacity(colour(s * r, 2.0)) for r in rewards] for s in (1, -1))
  assert up == down and up[0] == 0 and np.all(np.diff(up) > 0)
  assert colour(1.0, 2.0).split(",")[:3] != colour(-1.0, 2.0).split(",")[:3]
  assert colour(9.0, 2.0) == colour(2.0, 2.0)


def test_one_scale_for_all_rows_that_an_outlier_does_not_flatten():
  rng = np.random.default_rng(0)
  rows = [row(["a"] * 100, rng.normal(0, 1, 100).tolist()) for _ in range(10)]
  rows[0]["token_rewards"][0] = -500.0
  sizes = np.abs([r for x in rows for r in x["token_rewards"]])
  assert limit(rows) == pytest.approx(np.percentile(sizes, 98))
  assert limit([]) > 0 and limit([row(["a"], [0.0])]) > 0
  assert limit([row(["a", "b"], [float("nan"), 3.0])]) == 3.0


def test_every_token_has_its_value_in_title_and_in_text(tmp_path, read_page):
  rewards = [0.5, -1.25, 0.0]
  path = tmp_path / "new" / "heat.html"
  scored = row(["1", "19", "<|end|>"], rewards, logp_sft=[-0.1, -2.0, -0.3],
               logp_ref=[-0.6, -0.75, -0.3])
  write_heatmap([scored], path, "Scores of demos.jsonl")
  page = read_page(path)
  titles = [a["title"] for a in page.of("span", "tok")]
  assert titles == [
    "1  reward +0.500, log p sft −0.100, log p ref −0.600",
    "19  reward −1.250, log p sft −2.000, log p ref −0.750",
    "<|end|>  reward 0.000, log p sft −0.300, log p ref −0.300",
  ]
  assert "+0.50" in page.text and "−1.25" in page.text
  assert [a["type"] for a in page.of("input")] == ["checkbox"]  # shows them without a script.
  assert "−0.75 nats, 3 tokens" in page.text and "Scores of demos.jsonl" in page.text
  assert not page.of("script") and not page.of("img")


def test_white_space_and_control_characters_are_visible():
  tokens = [" the", "\n", "\t\t", "  ", "", "\u202e", "\x00", "é", "👩\u200d🚀"]
  view = heatmap_view([row(tokens, [0.1] * len(tokens))], 1.0)[0]["tokens"]
  assert [t["text"] for t in view] == [
    "·the", "↵", "⇥⇥", "··", "∅", "\\u202e", "\\x00", "é", "👩\u200d🚀"
  ]
  assert [t["breaks"] for t in view] == [False, True] + [False] * 7


def test_what_a_model_wrote_is_text(tmp_path, read_page):
  evil = '"><script>alert(1)</script>'
  rows = [row([evil], [0.1], prompt=evil)]
  messages = [{"role": evil, "content": evil}] * 2
  rows.append({**row(["a"], [0.2]), "prompt": None, "messages": messages})
  write_heatmap(rows, tmp_path / "h.html", evil)
  page = read_page(tmp_path / "h.html")
  assert not page.of("script") and page.text.count("<script>alert(1)</script>") >= 6


def test_messages_show_the_prompt_without_the_response():
  messages = [{"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}]
  scored = {**row(["3"], [0.1]), "messages": messages}
  del scored["prompt"]
  assert heatmap_view([scored], 1.0)[0]["prompt"] == "add 1 2"
  scored["messages"] = [{"role": "system", "content": "Be brief."}, *messages]
  assert heatmap_view([scored], 1.0)[0]["prompt"] == "system: Be brief.\nuser: add 1 2"


def test_lines_without_scores_are_left_out_and_long_ones_cut():
  rows = [{"prompt": "p"}, row(["a"], [0.1, 0.2]), row([], []), row(["a"] * 1_500, [0.1] * 1_500)]
  views = heatmap_view(rows, 1.0)
  assert len(views) == 1
  assert len(views[0]["tokens"]) == MAX_TOKENS and views[0]["hidden"] == 1_500 - MAX_TOKENS
  assert views[0]["reward"] == "+150.00"


def test_a_generator_of_rows_is_enough(tmp_path, read_page):
  write_heatmap((row(["a"], [x]) for x in (0.1, -0.2)), tmp_path / "h.html", "t")
  assert len(read_page(tmp_path / "h.html").of("span", "tok")) == 2
