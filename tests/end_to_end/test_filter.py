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


# --- Demonstrations that are not scored yet ------------------------------------------------------


@pytest.fixture(scope="module")
def demos_file(tmp_path_factory):
  """40 demonstrations, some of them wrong; one is longer than a row, and one is empty."""
  from dpr_jax.data.tasks import make_demos

  path = tmp_path_factory.mktemp("demos") / "demos.jsonl"
  records = [{"prompt": d.prompt[0]["content"], "response": d.response, "id": i}
             for i, d in enumerate(make_demos(("sort", "add"), 40, 5, corrupt=0.3))]
  records[7]["response"] = "long " * 30
  records[11]["response"] = " "
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path, records


def judge(demos, out, *argv):
  call(f"--demos={demos}", "--config=configs/smoke.py:debug", f"--workdir={out}/w",
       f"--kept={out}/kept.jsonl", f"--cut={out}/cut.jsonl", "--config.sft.steps=40",
       "--config.sft.optimizer.learning_rate=0.01",
       "--config.methods.cleaned_sft.reference_fraction=0.5", "--config.log.progress=False", *argv)


def test_every_record_is_kept_cut_or_not_judged(demos_file, tmp_path, capsys):
  from dpr_jax.evaluation.cleaning import FILE

  path, records = demos_file
  with pytest.raises(SystemExit) as stopped:
    judge(path, tmp_path)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and f"{path}:12: empty response" in error
  with pytest.raises(SystemExit):
    judge(path, tmp_path, "--config.data.on_empty=drop")
  error = capsys.readouterr().err
  assert f"{path}:8: " in error and "2 of 40 records" in error
  assert not (tmp_path / "kept.jsonl").exists() and not list(tmp_path.glob("w/config.json"))
  files = (f"--unjudged={tmp_path}/unjudged.jsonl", f"--html={tmp_path}/cut.html")
  judge(path, tmp_path, *files)
  parts = {name: lines(tmp_path / f"{name}.jsonl") for name in ("kept", "cut", "unjudged")}
  n = {name: len(part) for name, part in parts.items()}
  assert f"kept {n['kept']}, cut {n['cut']}, not judged 2" in capsys.readouterr().out
  assert sum(n.values()) == 40 and n["cut"] > 0 and [x["id"] for x in parts["unjudged"]] == [7, 11]
  assert "tokens exceed config.data.row_length" in parts["unjudged"][0]["filter_problem"]
  assert parts["unjudged"][1]["filter_problem"] == "empty turn"
  judged = {int(x["source"].rpartition(":")[2]) - 1: x
            for x in lines(tmp_path / "w" / "cleaned_sft" / FILE)}
  for name, part in parts.items():
    for x in part:
      assert {k: x[k] for k in records[x["id"]]} == records[x["id"]]
      assert name == "unjudged" or judged[x["id"]]["kept"] == (name == "kept")
      if name != "unjudged":
        assert x["reward"] == pytest.approx(judged[x["id"]]["reward_sum"], abs=1e-6)
        assert sum(x["token_rewards"]) == pytest.approx(x["reward"], abs=1e-3)
        assert "".join(x["tokens"][:-1]) == x["response"]
        assert (x["reward"] >= 0) == (name == "kept")
  assert [x["id"] for x in parts["kept"]] == sorted(x["id"] for x in parts["kept"])
  assert [x["reward"] for x in parts["cut"]] == sorted(x["reward"] for x in parts["cut"])
  demos = read_demos(tmp_path / "kept.jsonl").demos  # What is kept is a file of demonstrations.
  assert [d.response for d in demos] == [x["response"] for x in parts["kept"]]
  page = (tmp_path / "cut.html").read_text()
  assert page.index("Cut, the lowest score first") < page.index("Kept, closest to the cut")
  again = tmp_path / "again"
  again.mkdir()
  (tmp_path / "w").rename(again / "w")  # The models of the folds are there; only files are made.
  judge(path, again, f"--unjudged={again}/unjudged.jsonl")
  assert (again / "kept.jsonl").read_bytes() == (tmp_path / "kept.jsonl").read_bytes()


@pytest.mark.parametrize("flags, message", [
    (["--method=dpr"], "--method=dpr must be a method of the kind cleaned_sft"),
    (["--method=random_cut"], "--method=random_cut must be a method of the kind cleaned_sft"),
    (["--config.methods.cleaned_sft.treatment=mask"], "--method=cleaned_sft must be a method"),
    (["--unjudged={tmp}/u.jsonl", "--config.methods.cleaned_sft.folds=60"],
     "folds=60 exceeds the 39 different demonstrations"),
    (["--unjudged={tmp}/cut.jsonl"], "is the file of another flag"),
    (["--keep=0.5"], "--keep has no effect with --demos"),
    (["--config.seeds=2"], "--config.seeds has no effect with --demos"),
    (["--unjudged={tmp}/u.jsonl", "--config.methods.cleaned_sft.score=oracle"],
     "config.eval.benchmark: it cannot tell which"),
])
def test_what_cannot_be_judged_is_refused(demos_file, tmp_path, capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    judge(demos_file[0], tmp_path, *(flag.format(tmp=tmp_path) for flag in flags))
  assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_field_that_would_be_overwritten_is_refused(demos_file, tmp_path, capsys):
  path, records = demos_file
  (tmp_path / "demos.jsonl").write_text(
      "".join(json.dumps(r | ({"reward": 1.0} if r["id"] == 3 else {})) + "\n" for r in records))
  with pytest.raises(SystemExit):
    judge(tmp_path / "demos.jsonl", tmp_path, f"--unjudged={tmp_path}/unjudged.jsonl")
  assert "demos.jsonl:4: field 'reward' is one that the scores" in capsys.readouterr().err
