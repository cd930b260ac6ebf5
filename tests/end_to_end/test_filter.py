"""filter keeps what it says, and what it keeps is a file of demonstrations."""

import json
import random

import numpy as np
import pytest

from dpr_jax import cli, filter
from dpr_jax.data.formats import read_demos


def call(*argv):
  cli.run_entry_point(filter.main, [str(a) for a in argv])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def scored(tmp_path):
  """12 lines as `score` writes them."""
  rng = np.random.default_rng(3)
  records = []
  for i in range(12):
    n = int(rng.integers(1, 6))
    sft, ref = -rng.exponential(size=n), -rng.exponential(size=n)
    records.append({
        "prompt": f"p{i}", "response": "r" * n, "tokens": ["r"] * n, "logp_sft": sft.tolist(),
        "logp_ref": ref.tolist(), "token_rewards": (sft - ref).tolist(),
        "endogenous": rng.normal(size=n).tolist(),
        "reward": float((sft - ref).sum()),
    })
  path = tmp_path / "scored.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path, records


@pytest.mark.parametrize("by, field", [
    ("reward", "token_rewards"), ("logp_sft", "logp_sft"), ("logp_ref", "logp_ref"),
    ("endogenous", "endogenous")])
@pytest.mark.parametrize("reduce, function", [
    ("sum", sum), ("mean", lambda x: sum(x) / len(x)), ("min", min)])
def test_a_share_with_the_highest_scores_is_kept_in_order(
    scored, tmp_path, by, field, reduce, function
):
  path, records = scored
  call(f"--input={path}", f"--kept={tmp_path}/kept.jsonl", f"--cut={tmp_path}/cut.jsonl",
       f"--by={by}", f"--reduce={reduce}", "--keep=0.75")
  ranked = sorted(records, key=lambda r: function(r[field]))
  kept, cut = lines(tmp_path / "kept.jsonl"), lines(tmp_path / "cut.jsonl")
  assert [r["prompt"] for r in cut] == [r["prompt"] for r in ranked[:3]]
  assert [r["prompt"] for r in kept] == [r["prompt"] for r in records if r not in ranked[:3]]
  for r in kept + cut:
    assert r["filter_score"] == pytest.approx(function(r[field]), abs=1e-6)


def test_the_sign_of_the_reward_cuts_and_the_rest_are_demonstrations(scored, tmp_path, capsys):
  path, records = scored
  call(f"--input={path}", f"--kept={tmp_path}/kept.jsonl", f"--html={tmp_path}/cut.html",
       "--above=0")
  good = [r for r in records if sum(r["token_rewards"]) > 0]
  assert 0 < len(good) < 12 and f"kept {len(good)} of 12" in capsys.readouterr().out
  demos = read_demos(tmp_path / "kept.jsonl").demos
  assert [(d.prompt[-1]["content"], d.response) for d in demos] == [
      (r["prompt"], r["response"]) for r in good]
  page = (tmp_path / "cut.html").read_text()
  for r in records:
    assert (f">{r['prompt']}<" in page) == (r not in good)


def test_length_and_chance(scored, tmp_path):
  path, records = scored
  call(f"--input={path}", f"--kept={tmp_path}/long.jsonl", "--by=length", "--above=2")
  assert [r["prompt"] for r in lines(tmp_path / "long.jsonl")] == [
      r["prompt"] for r in records if len(r["tokens"]) > 2]
  for seed in (0, 0, 1):
    out = tmp_path / f"{seed}_{random.random()}.jsonl"
    call(f"--input={path}", f"--kept={out}", "--by=random", "--keep=0.5", f"--seed={seed}")
  a, again, other = (
      [r["prompt"] for r in lines(p)] for p in sorted(tmp_path.glob("[01]_*.jsonl")))
  assert a == again != other and len(a) == len(other) == 6


NO_LIST = "record 1: field 'token_rewards' must be a list of numbers below"


@pytest.mark.parametrize("flags, content, message", [
    (["--keep=0.5", "--above=0"], None, "give --above=SCORE or --keep=SHARE, one of them"),
    ([], None, "give --above=SCORE or --keep=SHARE, one of them"),
    (["--above=99"], None, "no line is kept; the highest score is"),
    (["--above=0"], '{"token_rewards": [1, "x"]}', NO_LIST),
    (["--above=0"], '{"token_rewards": []}', NO_LIST),
    (["--above=0"], '{"token_rewards": [NaN]}', NO_LIST),
    (["--above=0"], '{"token_rewards": [1%s]}' % ("0" * 400), NO_LIST),
    (["--above=0"], '{"token_rewards": [1e308, 1e308]}', NO_LIST),
    (["--above=0"], '{"token_rewards": [true]}', NO_LIST),
    (["--above=0"], '{"token_rewards": ["1"]}', NO_LIST),
    (["--above=0"], '{"prompt": "p"}', NO_LIST),
    (["--above=0", "--cut={kept}"], None, "--cut={kept} is the file of another flag"),
])
def test_bad_input(scored, tmp_path, capsys, flags, content, message):
  path, kept = scored[0], tmp_path / "kept.jsonl"
  if content is not None:
    path.write_text(content)
  with pytest.raises(SystemExit) as end:
    call(f"--input={path}", f"--kept={kept}", *(f.format(kept=kept) for f in flags))
  assert end.value.code == 2 and not kept.exists()
  err = capsys.readouterr().err.strip().splitlines()
  assert len(err) == 1 and message.format(kept=kept) in err[0]
