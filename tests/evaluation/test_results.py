"""results.json as a function of the files of a run."""

import json

import numpy as np
import pytest

from dpr_jax.evaluation.metrics import ACCURACY, EosRate, Expert, HeldoutNLL, Length, SampleNLL
from dpr_jax.evaluation.results import build_results, pairs
from dpr_jax.training.stopping import write_stopped
from dpr_jax.workdir import Workdir

COLUMNS = {
    "accuracy": ACCURACY, "length": Length().column(), "eos_rate": EosRate().column(),
    **HeldoutNLL.columns, **SampleNLL.columns, **Expert.columns,
}


def write_run(folder, rng, systems, n=40, subjects=("dpr",), values=None):
  """Files of a run that compares `systems`; returns (records, held-out NLLs) of each.

  Args:
    values: system -> further columns of measures.json.
  """
  workdir = Workdir(folder)
  workdir.samples.mkdir(parents=True)
  truth = {}
  for name in systems:
    records = []
    for mode in ("sampled", "greedy"):
      for i in range(n):
        right, length = float(rng.random() < 0.5), int(rng.integers(1, 9))
        records.append({
            "prompt": f"p{i}", "task": ("add", "greet")[i % 2], "answer": "a", "mode": mode,
            "groups": [("add", "unique"), ("greet", "varied")][i % 2],
            "response": "r", "correct": bool(right), "length": length, "hit_eos": True, "seed": 0,
            "scores": {"accuracy": right, "length": length, "eos_rate": 1.0},
        })
    workdir.system_file(name).write_text("".join(json.dumps(r) + "\n" for r in records))
    truth[name] = records
  (workdir.samples / "heatmap_demos.jsonl").write_text("{}\n")
  nll = {name: rng.random(n).tolist() for name in systems if name != "contrastive"}
  write_measures(workdir, {
      name: {**({"heldout_nll": nll[name]} if name in nll else {}), **(values or {}).get(name, {})}
      for name in systems
  })
  workdir.stage("sft").mkdir()
  lines = [{"step": s, "loss": 1.0, "tokens": 10.0 * s, "seconds": 0.5 * s} for s in (1, 2)]
  (folder / "sft" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  labels = {name: name.upper() for name in ("contrastive", "dpr")}
  described = {"labels": labels, "subjects": list(subjects), "own_budget": {"sft": "steps 2"},
               "always": {"base": "Base", "ref": "Ref", "sft": "SFT"}, "reference": "ref"}
  workdir.config_file.write_text(json.dumps({"described": described}))
  return truth, nll


def write_measures(workdir, values):
  columns = {name: vars(column) for name, column in COLUMNS.items()}
  workdir.measures_file.write_text(json.dumps({"columns": columns, "values": values}))


def test_means_counts_and_order(tmp_path, rng):
  truth, nll = write_run(tmp_path, rng, ["sft", "dpr", "contrastive", "base"])
  results = build_results([tmp_path], [3])
  assert results["seeds"] == [3] and results["main"] == "dpr"
  assert results["labels"] == {
      "base": "Base", "ref": "Ref", "sft": "SFT", "contrastive": "CONTRASTIVE", "dpr": "DPR"
  }
  assert list(results["systems"]) == ["base", "sft", "contrastive", "dpr"]
  for name, records in truth.items():
    metrics = results["systems"][name]
    for mode in ("sampled", "greedy"):
      rows = [r for r in records if r["mode"] == mode]
      adds = [r["correct"] for r in rows if r["task"] == "add"]
      right = [r["correct"] for r in rows]
      assert metrics[f"accuracy_{mode}"]["mean"] == pytest.approx(np.mean(right))
      assert metrics[f"accuracy_{mode}"]["n"] == 40
      assert metrics[f"accuracy_{mode}/add"]["mean"] == pytest.approx(np.mean(adds))
      assert metrics[f"accuracy_{mode}/unique"] == metrics[f"accuracy_{mode}/add"]
      lengths = [r["length"] for r in rows]
      assert metrics[f"length_{mode}"]["mean"] == pytest.approx(np.mean(lengths))
  assert results["systems"]["sft"]["heldout_nll"]["mean"] == pytest.approx(np.mean(nll["sft"]))
  assert "heldout_nll" not in results["systems"]["contrastive"]
  assert results["stages"]["sft"] == {
      "steps": 2, "seconds": 1.0, "tokens": 20.0, "own_budget": "steps 2"
  }
  # What every column is, and no column of which nothing was found.
  assert set(results["columns"]) == {c for m in results["systems"].values() for c in m}
  assert results["columns"]["accuracy_greedy"]["label"] == "Accuracy, greedy"
  groups = results["columns"]["accuracy_sampled/unique"], results["columns"]["accuracy_sampled/add"]
  assert [g["main"] for g in groups] == [True, False] and not any(g["compared"] for g in groups)
  assert results["columns"]["accuracy_sampled/unique"]["label"] == (
      "Accuracy, sampled, one right answer"
  )


def test_comparisons_are_paired_differences(tmp_path, rng):
  truth, _ = write_run(tmp_path, rng, ["sft", "dpr"])
  comparisons = build_results([tmp_path], [0])["comparisons"]
  (found,) = [c for c in comparisons if c["metric"] == "accuracy_greedy"]
  assert found["pair"] == ["dpr", "sft"]
  rows = {
      name: [r["correct"] for r in records if r["mode"] == "greedy"]
      for name, records in truth.items()
  }
  assert found["difference"] == pytest.approx(np.mean(rows["dpr"]) - np.mean(rows["sft"]))
  assert found["ci95"][0] <= found["difference"] <= found["ci95"][1] and 0 < found["p"] <= 1


def test_several_seeds_and_a_system_that_one_lacks(tmp_path, rng):
  write_run(tmp_path / "a", rng, ["sft", "dpr"])
  write_run(tmp_path / "b", rng, ["sft"])
  results = build_results([tmp_path / "a", tmp_path / "b"], [0, 1])
  assert list(results["systems"]) == ["sft"]
  assert results["systems"]["sft"]["accuracy_sampled"]["n"] == 80


def test_what_base_and_ref_make_of_the_samples_is_compared(tmp_path, rng):
  nats = {
      name: {f"sample_nll_{judge}": rng.random(40).tolist() for judge in ("base", "ref")}
      for name in ("sft", "dpr")
  }
  write_run(tmp_path, rng, ["sft", "dpr"], values=nats)
  results = build_results([tmp_path], [0])
  for metric in nats["sft"]:
    for name, values in nats.items():
      assert results["systems"][name][metric]["mean"] == pytest.approx(np.mean(values[metric]))
    (c,) = [c for c in results["comparisons"] if c["metric"] == metric]
    gap = np.mean(nats["dpr"][metric]) - np.mean(nats["sft"][metric])
    assert c["pair"] == ["dpr", "sft"] and c["difference"] == pytest.approx(gap)
  # The held-out NLL rises under DPR by design: it is told, and decides nothing.
  assert not [c for c in results["comparisons"] if c["metric"] == "heldout_nll"]


def _expert_scores(rng, systems, n=40):
  draw = lambda: {
      "reverse_kl": rng.random(n).tolist(), "forward_kl": rng.random(n - 3).tolist(),
      "expert_logp": [(-rng.random(rng.integers(1, 9))).tolist() for _ in range(n)],
  }
  return {name: draw() for name in systems}


def test_distances_to_the_expert_are_compared_at_equal_length(tmp_path, rng):
  """Each with the shorter response of the two compared; alone, of its own and SFT's."""
  systems, gaps = ["sft", "contrastive", "dpr"], []
  for seed in "ab":
    scores = _expert_scores(rng, systems)
    write_run(tmp_path / seed, rng, systems, values=scores)
    gap = {m: np.mean(scores["dpr"][m]) - np.mean(scores["sft"][m])
           for m in ("reverse_kl", "forward_kl")}
    gap["expert_logp"] = alone = 0.0
    for i in range(40):
      dpr, sft, con = (scores[n]["expert_logp"][i] for n in ("dpr", "sft", "contrastive"))
      m = min(len(dpr), len(sft))
      gap["expert_logp"] += (sum(dpr[:m]) - sum(sft[:m])) / m / 40
      m = min(len(con), len(sft))
      alone += sum(con[:m]) / m / 40
    gaps.append((gap, alone))
  results = build_results([tmp_path / "a", tmp_path / "b"], [0, 1])
  for metric in gaps[0][0]:
    (c,) = [c for c in results["comparisons"]
            if c["metric"] == metric and c["pair"] == ["dpr", "sft"]]
    assert c["difference"] == pytest.approx(np.mean([gap[metric] for gap, _ in gaps]))
  found = results["systems"]["contrastive"]
  assert found["expert_logp"]["mean"] == pytest.approx(np.mean([t for _, t in gaps]))
  assert found["forward_kl"]["n"] == 2 * 37 and found["reverse_kl"]["n"] == 80


def test_without_an_expert_there_is_no_distance_to_it(tmp_path, rng):
  write_run(tmp_path, rng, ["sft"])
  assert not {"reverse_kl", "forward_kl", "expert_logp"} & set(
      build_results([tmp_path], [0])["systems"]["sft"]
  )


def test_a_stage_that_ended_early_is_noted(tmp_path, rng):
  for seed in (4, 5):
    write_run(tmp_path / str(seed), rng, ["sft", "dpr"])
  assert build_results([tmp_path / "4"], [4])["notes"] == []
  (tmp_path / "5" / "dpr").mkdir()
  write_stopped(tmp_path / "5" / "dpr", 7, 20, "the KL was too large")
  (note,) = build_results([tmp_path / "4", tmp_path / "5"], [4, 5])["notes"]
  assert note.startswith("Stage dpr of seed 5 ended after step 7 of 20: the KL was too large.")


# --- What is compared with what ------------------------------------------------------------------


def test_every_system_is_held_against_sft_and_every_subject_against_all():
  found = pairs(["low", "spin", "reward_to_go", "dpr"], ["dpr", "reward_to_go"])
  assert found == [
      ("sft", "ref"), ("low", "sft"), ("spin", "sft"), ("reward_to_go", "sft"), ("dpr", "sft"),
      # The last first: it is what the run is about.
      ("dpr", "low"), ("dpr", "spin"), ("dpr", "reward_to_go"),
      ("reward_to_go", "low"), ("reward_to_go", "spin"),
  ]
  assert pairs([], []) == [("sft", "ref")]
  assert pairs(["dpr"], ["dpr"]) == [("sft", "ref"), ("dpr", "sft")]


def test_no_pair_is_compared_twice(rng):
  names = [f"m{i}" for i in range(int(rng.integers(1, 9)))]
  subjects = [n for n in names if rng.random() < 0.5]
  found = pairs(names, subjects)
  assert len({frozenset(p) for p in found}) == len(found)
  for subject in subjects:
    for other in {*names, "sft"} - {subject}:
      assert (subject, other) in found or (other, subject) in found


def test_a_subject_is_compared_with_what_is_there(tmp_path, rng):
  write_run(tmp_path, rng, ["sft", "contrastive", "dpr"], subjects=("dpr",))
  results = build_results([tmp_path], [0])
  found = {tuple(c["pair"]) for c in results["comparisons"]}
  assert found == {("contrastive", "sft"), ("dpr", "sft"), ("dpr", "contrastive")}
