"""Systems side by side: figures, differences and win shares recomputed from the files by hand."""

import json
import random

import numpy as np
import pytest

from dpr_jax import cli, compare
from dpr_jax.evaluation import statistics
from dpr_jax.evaluation.benchmarks.arena_hard import ArenaHard
from dpr_jax.evaluation.benchmarks.lima import Lima
from dpr_jax.evaluation.benchmarks.mt_bench import MTBench
from dpr_jax.evaluation.metrics import ACCURACY, Repetition
from dpr_jax.evaluation.statistics import interval
from dpr_jax.fingerprints import seal

PROMPTS, SAMPLES = 12, 3


def put_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(tmp_path):
  """Writes a folder as `evaluate` does."""

  def write(name, seed, temperature=1.0, samples=SAMPLES, prompts=PROMPTS, judged=None, **changes):
    folder, rng = tmp_path / name, random.Random(seed)
    folder.mkdir(parents=True)
    records = [
        {"index": i, "sample": j, "prompt": f"ask {i}", "answer": "x",
         "groups": ["t", "varied" if i % 2 else "unique"],
         "response": rng.choice(("a b c d a b c d", "x y", "", f"<b>{seed}</b>")),
         "token_ids": [1] * (j + 1), "length": j + 1, "hit_eos": True,
         "scores": {} if judged else {"accuracy": float(rng.random() < 0.5)}}
        for i in range(prompts) for j in range(samples)
    ]
    figures, columns = {}, {}
    if not judged:
      values = np.reshape([r["scores"]["accuracy"] for r in records], (prompts, samples)).mean(1)
      figures, columns = {"accuracy": interval([values])}, {"accuracy": vars(ACCURACY)}
    else:
      figures = {"win_rate": {"mean": 0.5, "ci95": [0.4, 0.6], "n": prompts}}
      columns = {"win_rate": vars(Lima.summaries["win_rate"])}
      put_lines(folder / "judged.jsonl", [
          {"index": r["index"], "sample": r["sample"], "scores": {"win_rate": judged(r)}}
          for r in records
      ])
    settings = {"data": "", "benchmark": "lima" if judged else "tasks", "benchmark.field": 1,
                "samples": samples, "temperature": temperature, "top_k": 0, "max_new_tokens": 8}
    results = {"benchmark": settings["benchmark"], "model": f"runs/{name.split('/')[0]}",
               "n": prompts, "metrics": figures, "columns": columns, "overlap": {},
               "settings": settings, "versions": {"jax": "1"}, **changes}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps({"settings": settings, "contents": {}}))
    put_lines(folder / "responses.jsonl", map(seal, records))
    return folder

  return write


def call(tmp_path, *specs, name="page", flags=()):
  out = tmp_path / f"{name}.html"
  cli.run_entry_point(compare.main, [*(f"--results={s}" for s in specs), f"--output={out}", *flags])
  return json.loads(out.with_suffix(".json").read_text()), out.read_text()


def values(folder, of):
  records = [json.loads(line) for line in (folder / "responses.jsonl").open()]
  return np.reshape([of(r) for r in records], (PROMPTS, -1)).mean(axis=1)


def accuracy(record):
  return record["scores"]["accuracy"]


def test_figures_differences_and_wins_are_those_of_the_files(make, tmp_path):
  seed = random.randrange(1 << 30)
  a, b = make("a", seed), make("b", seed + 1)
  found, page = call(tmp_path, f"A={a}", f"B={b}")
  x, y = (values(f, accuracy) for f in (a, b))
  key = "tasks: accuracy"
  for name, v in (("A", x), ("B", y)):
    assert found["systems"][name][key]["mean"] == pytest.approx(v.mean())
    assert f"{100 * v.mean():.1f}" in page
    for texts, of in (("length", lambda r: r["length"]), ("repetition", Repetition().score)):
      figure = found["systems"][name][f"tasks: {texts}"]
      assert figure["mean"] == pytest.approx(values(a if name == "A" else b, of).mean())
  (c,) = [c for c in found["comparisons"] if c["metric"] == key]
  expected = statistics.compare([y], [x])
  assert c["pair"] == ["B", "A"] and c["n"] == PROMPTS
  assert c["difference"] == pytest.approx(y.mean() - x.mean())
  assert c["p"] == expected["p"] and c["ci95"] == pytest.approx(expected["ci95"])
  (wins,) = found["wins"]
  cell = wins["cells"]["B"]["A"]
  assert (cell["wins"], cell["ties"], cell["losses"]) == (
      sum(y > x), sum(y == x), sum(y < x))
  assert cell["mean"] == pytest.approx((sum(y > x) + sum(y == x) / 2) / PROMPTS)
  assert cell["mean"] + wins["cells"]["A"]["B"]["mean"] == pytest.approx(1)


def test_examples_begin_with_the_largest_disagreement(make, tmp_path):
  a, b = make("a", 1), make("b", 2)
  found, page = call(tmp_path, f"A={a}", f"B={b}")
  spreads = [e["spread"] for e in found["examples"]]
  assert spreads == sorted(spreads, reverse=True) and spreads[0] == 1
  read = lambda folder: [json.loads(line) for line in (folder / "responses.jsonl").open()]
  firsts = [read(folder)[::SAMPLES] for folder in (a, b)]
  for e in found["examples"]:
    x, y = (records[e["index"]] for records in firsts)
    assert e["spread"] == abs(accuracy(x) - accuracy(y))
    assert e["responses"]["A"]["text"] == x["response"] in (
        "a b c d a b c d", "x y", "", "<b>1</b>")
  assert "<b>1</b>" not in page and "<script" not in page


def test_temperatures_of_one_system_are_columns_and_a_frontier(make, tmp_path):
  for seed, name in enumerate(("a", "b")):
    for t in (1.0, 0.5):
      make(f"{name}/{t:g}", 10 * seed + int(10 * t), t)
    make(f"{name}/greedy", 10 * seed, 0.0, samples=1)
  found, page = call(tmp_path, f"A={tmp_path}/a", f"B={tmp_path}/b")
  labels = [b["label"] for b in found["benchmarks"]]
  assert set(labels) == {"tasks, temperature 1", "tasks, temperature 0.5", "tasks, greedy"}
  frontier = found["frontiers"]["tasks"]
  assert frontier["k"] == SAMPLES and frontier["temperatures"] == [1.0, 0.5, 0.0]
  records = [json.loads(line) for line in (tmp_path / "b/1/responses.jsonl").open()]
  distinct = [
      len({" ".join(r["response"].split()) for r in records if r["index"] == i and accuracy(r)})
      for i in range(1, PROMPTS, 2)
  ]
  point = frontier["curves"]["B"][0]
  assert point["coverage"]["mean"] == pytest.approx(np.mean(distinct))
  assert point["accuracy"]["mean"] == pytest.approx(np.mean([accuracy(r) for r in records]))
  assert set(frontier["equal_accuracy"]) == {"B"} and "minus A at equal accuracy" in page


def test_runs_of_a_system_are_its_seeds(make, tmp_path):
  folders = [make(f"{s}/{run}", 10 * i + run) for i, s in enumerate("ab") for run in (1, 2, 3)]
  found, page = call(tmp_path, f"A={tmp_path}/a/*", f"B={tmp_path}/b")
  per_run = [values(f, accuracy) for f in folders]
  figure = found["systems"]["A"]["tasks: accuracy"]
  assert figure["ci95"] == pytest.approx(interval(per_run[:3])["ci95"])
  (c,) = [c for c in found["comparisons"] if c["metric"] == "tasks: accuracy"]
  assert c["ci95"] == pytest.approx(statistics.compare(per_run[3:], per_run[:3])["ci95"])
  assert c["n"] == 3 * PROMPTS and "3 runs of each system" in page


def test_verdicts_that_are_missing_leave_their_prompt_out(make, tmp_path):
  make("a", 1, judged=lambda r: None if r["index"] == 0 else 1.0, samples=1)
  make("b", 2, judged=lambda r: float(r["index"] % 2), samples=1)
  found, _ = call(tmp_path, tmp_path / "a", tmp_path / "b")
  (wins,) = found["wins"]
  cell = wins["cells"]["a"]["b"]  # called as their models
  assert (cell["wins"], cell["ties"], cell["losses"]) == (PROMPTS // 2 - 1, PROMPTS // 2, 0)
  (tmp_path / "b" / "judged.jsonl").unlink()  # A folder of before there was one.
  found, _ = call(tmp_path, tmp_path / "a", tmp_path / "b", name="old")
  assert not found["wins"] and found["systems"]["b"]["lima: win_rate"]["mean"] == 0.5


def test_token_rewards_colour_the_responses(make, tmp_path):
  a = make("a", 1)
  records = [json.loads(line) for line in (a / "responses.jsonl").open()]
  put_lines(tmp_path / "scored.jsonl", [
      {**r, "tokens": ["<i>tok"], "token_rewards": [0.5], "reward": 0.5} for r in records
  ])
  _, page = call(tmp_path, f"A={a}", flags=[f"--token_rewards={tmp_path}/scored.jsonl"])
  assert "&lt;i&gt;tok" in page and "<i>tok" not in page


def test_figures_without_scores_per_prompt_are_shown_alone(make, tmp_path):
  for i, name in enumerate("ab"):
    folder = make(name, i, samples=1)
    results = json.loads((folder / "results.json").read_text())
    results |= {
        "metrics": {"arc/acc": {"mean": 0.25 + i / 2, "ci95": [None, None], "n": PROMPTS}},
        "columns": {"arc/acc": {**vars(ACCURACY), "label": "arc/acc"}},
        "settings": {"benchmark": "lm_eval", "benchmark.tasks": ["arc"], "data": ""},
    }
    (folder / "results.json").write_text(json.dumps(results))
    put_lines(folder / "responses.jsonl", [
        seal({"index": j, "sample": 0, "task": "arc", "doc": j, "logp": -1.0, "is_greedy": True})
        for j in range(4 * PROMPTS)
    ])
    found, page = call(tmp_path, f"A={tmp_path}/a", *([f"B={folder}"] if i else []), name=f"p{i}")
  assert found["systems"]["B"]["tasks: arc/acc"]["mean"] == 0.75 and "75.0" in page
  assert not found["comparisons"] and not found["wins"] and not found["examples"]
  assert found["notes"] == [
      "tasks: its files have no scores per prompt, so there are no paired differences."]


def cut(folder):
  path = folder / "responses.jsonl"
  path.write_bytes(path.read_bytes()[:-30])


def shorten(folder):
  path = folder / "responses.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit(folder):
  results = json.loads((folder / "results.json").read_text())
  results["metrics"]["accuracy"]["mean"] += 0.1
  (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("damage, said", [
    (cut, f"responses.jsonl:{PROMPTS * SAMPLES}: cut or edited"),
    (shorten, f"{PROMPTS * SAMPLES - 1} responses, and results.json is of {PROMPTS * SAMPLES}"),
    (edit, "accuracy is"),
    (lambda f: (f / "results.json").unlink(), "results.json: no such file"),
    (lambda f: (f / "results.json").write_text("{}"), "results.json: has no 'benchmark'"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: cut"),
    (lambda f: (f / "responses.jsonl").write_text(""), "0 responses"),
], ids=["cut", "shortened", "edited", "unfinished", "foreign", "torn", "empty"])
def test_a_damaged_folder_is_named(make, tmp_path, capsys, damage, said):
  a, b = make("a", 1), make("b", 2)
  damage(b)
  with pytest.raises(SystemExit) as e:
    call(tmp_path, f"A={a}", f"B={b}")
  error = capsys.readouterr().err
  assert e.value.code == 2 and said in error and f"{b}" in error and error.count("\n") == 1
  assert not list(tmp_path.glob("page*"))


def test_folders_that_cannot_be_compared_are_named(make, tmp_path, capsys):
  a, fewer = make("a", 1), make("fewer", 2, prompts=5)
  other = make("other", 3)
  records = [json.loads(line) for line in (other / "responses.jsonl").open()]
  for r in records:
    del r["checksum"]
    r["prompt"] += "!"
  put_lines(other / "responses.jsonl", map(seal, records))
  for specs, said in (
      ((f"A={a}", f"B={fewer}"), "5 prompts"), ((f"A={a}", f"B={other}"), "prompt 1, 'ask 0!'"),
      ((f"A={a}", f"B={a}"), "twice"), ((f"A={tmp_path}/none",), "no folder there"),
  ):
    with pytest.raises(SystemExit) as e:
      call(tmp_path, *specs)
    error = capsys.readouterr().err
    assert e.value.code == 2 and said in error and error.count("\n") == 1


def test_other_versions_and_settings_are_said(make, tmp_path):
  make("a", 1), make("b", 2, versions={"jax": "2"}, temperature=0.5)
  found, page = call(tmp_path, tmp_path / "a", tmp_path / "b")
  assert "tasks: systems differ in version of jax: 1 for a; 2 for b." in found["notes"]
  assert "tasks: systems differ in temperature: 1.0 for a; 0.5 for b." in found["notes"]
  assert found["notes"][0] in page


def test_what_a_judge_said_of_one_response():
  texts = lambda **of: {"replies": {k: {"text": f"[[{v}]]"} for k, v in of.items()}, "demo": None}
  assert Lima().judged(texts(ab="A", ba="B")) == {"win_rate": 1.0}
  assert Lima().judged(texts(ab="A", ba="A")) == {"win_rate": 0.5}
  assert Lima().judged(texts(ab="A", ba="?")) == {"win_rate": None}
  assert ArenaHard().judged(texts(ab="A>>B", ba="A=B")) == {"win_rate": 0.75}
  assert MTBench().judged(texts(turn_1="7", turn_2="4")) == {"score": 5.5}


def test_repetition_is_the_share_of_repeated_n_grams():
  score = lambda text, n=2: Repetition(n=n).score({"response": text})
  assert score("a b a b") == pytest.approx(1 / 3)  # ab, ba, ab
  assert score("a a a a a") == 0.75 and score("a") == score("") == 0.0
  assert score("a b c d a b c d", 4) == pytest.approx(1 / 5)


@pytest.mark.parametrize("spec, name, pattern", [
    ("DPR=runs/ev", "DPR", "runs/ev"), ("runs/ev", "", "runs/ev"),
    ("DPR=runs/beta=0.5/ev", "DPR", "runs/beta=0.5/ev"),
    ("runs/beta=*/ev", "", "runs/beta=*/ev"), ("gs://b/beta=0.5/x", "", "gs://b/beta=0.5/x"),
    ("DPR=gs://b/beta=0.5/x", "DPR", "gs://b/beta=0.5/x"),
], ids=["name", "bare", "name_sweep", "bare_sweep", "bucket", "name_bucket"])
def test_the_name_ends_at_the_first_equals_sign_before_any_slash(spec, name, pattern):
  assert compare.split_name(spec) == (name, pattern)


def test_folders_of_a_sweep_are_found(make, tmp_path):
  beta = make("beta=0.5/ev", 1)
  assert compare.find_folders(f"DPR={beta}") == ("DPR", [beta])
  assert compare.find_folders(f"{tmp_path}/beta=*/ev") == ("", [beta])


def rewrite(folder, change):
  """Other responses.jsonl, whose lines `change` has edited."""
  records = [json.loads(line) for line in (folder / "responses.jsonl").open()]
  for r in records:
    del r["checksum"]
    change(r)
  put_lines(folder / "responses.jsonl", map(seal, records))


@pytest.mark.parametrize("prompts", [5, PROMPTS])
def test_temperatures_of_other_prompts_are_no_frontier(make, tmp_path, prompts):
  for seed, name in enumerate("ab"):
    make(f"{name}/1", seed)
    other = make(f"{name}/half", 9 + seed, 0.5, prompts=prompts)
    rewrite(other, lambda r: r.update(prompt=r["prompt"] + "!" * (prompts == PROMPTS)))
  found, page = call(tmp_path, f"A={tmp_path}/a", f"B={tmp_path}/b")
  (note,) = [n for n in found["notes"] if "no frontier" in n]
  assert not found["frontiers"] and "are of different prompts" in note and note in page


def test_what_a_frontier_leaves_out_is_said(make, tmp_path):
  make("a/t2", 1, 2.0), make("a/k5", 2, samples=5), make("c/t1", 3)
  for seed, name in enumerate("ab"):
    for t in (1.0, 0.5):
      make(f"{name}/r1/{t:g}", 10 + 2 * seed + int(t), t)
  make("a/r0/1", 20)
  found, _ = call(tmp_path, *(f"{n.upper()}={tmp_path}/{n}" for n in "abc"))
  frontier = found["frontiers"]["tasks"]
  assert frontier["temperatures"] == [1.0, 0.5] and set(frontier["curves"]) == {"A", "B"}
  first = values(tmp_path / "a/r0/1", accuracy).mean()  # The run whose path comes first.
  assert frontier["curves"]["A"][0]["accuracy"]["mean"] == pytest.approx(first)
  said = [n.partition("leaves out ")[2] for n in found["notes"] if "leaves out" in n]
  assert sorted(said) == sorted([
      f"{tmp_path}/a/r1/1: not all systems and temperatures have more than 1 run.",
      f"{tmp_path}/a/t2: not all systems have temperature 2.",
      f"{tmp_path}/a/k5: evaluated in another way than most, which have {SAMPLES} samples.",
      f"{tmp_path}/c/t1: C has no two temperatures.",
  ])


def test_systems_without_common_temperatures_have_no_frontier(make, tmp_path):
  for seed, (name, other) in enumerate((("a", 0.5), ("b", 0.7))):
    make(f"{name}/1", seed), make(f"{name}/other", 9 + seed, other)
  found, _ = call(tmp_path, f"A={tmp_path}/a", f"B={tmp_path}/b")
  assert not found["frontiers"]
  assert any("do not have two temperatures in common" in n for n in found["notes"])


def test_a_model_that_is_called_as_another_system_is_refused(make, tmp_path, capsys):
  a, b = make("a", 1), make("b", 2)
  for specs in ((f"b={a}", b), (b, f"b={a}")):
    with pytest.raises(SystemExit) as e:
      call(tmp_path, *specs)
    error = capsys.readouterr().err
    assert e.value.code == 2 and f"--results={b}: would be called b" in error
    assert error.count("\n") == 1


def put_pairs(folder, pairs, skipped):
  """A folder of the benchmark `preference`, whose n counts the pairs that were scored."""
  results = json.loads((folder / "results.json").read_text())
  n = pairs - len(skipped)
  results |= {
      "benchmark": "preference", "n": n, "settings": {"benchmark": "preference", "data": ""},
      "metrics": {"accuracy": {"mean": 0.5, "ci95": [0.1, 0.9], "n": n}},
  }
  (folder / "results.json").write_text(json.dumps(results))
  put_lines(folder / "responses.jsonl", [
      seal({"index": i, "sample": 0, "prompt": f"ask {i}", **({"skipped": "long"} if i in skipped
            else {"chosen": {"scores": {}}, "rejected": {"scores": {}}})}) for i in range(pairs)
  ])


def test_preference_folders_are_of_the_same_pairs_scored_or_not(make, tmp_path, capsys):
  for i, name in enumerate("ab"):
    put_pairs(make(name, i), 6, range(i))
  found, _ = call(tmp_path, f"A={tmp_path}/a", f"B={tmp_path}/b")
  assert found["systems"]["B"]["preference: accuracy"]["n"] == 5
  assert ("preference: systems differ in the number of prompts that were scored: 6 for A; 5 for B."
          in found["notes"])
  put_pairs(tmp_path / "b", 7, [3])  # As many as A has are scored.
  with pytest.raises(SystemExit):
    call(tmp_path, f"A={tmp_path}/a", f"B={tmp_path}/b", name="other")
  assert f"{tmp_path}/b: 7 prompts, and {tmp_path}/a has 6" in capsys.readouterr().err
