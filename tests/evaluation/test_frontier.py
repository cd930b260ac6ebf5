"""The frontier: counts by hand, differences against loops, enumeration and what must be so."""

import itertools
import json

import numpy as np
import pytest

from dpr_jax.evaluation import frontier
from dpr_jax.evaluation.frontier import mean_difference, summarize
from dpr_jax.evaluation.statistics import bootstrapped

TEMPERATURES = (1.0, 0.7, 0.5)


def write(folder, name, counts, k=4, groups=None, greedy=None):
  """counts[t][p] = (right, distinct) of prompt p at the t-th temperature."""
  folder.mkdir(parents=True, exist_ok=True)
  groups = groups or [[]] * len(counts[0])
  rows = [*zip(TEMPERATURES, [k] * len(counts), counts), (0.0, 1, greedy or [(0, 0)] * len(groups))]
  (folder / f"{name}.jsonl").write_text("".join(
      json.dumps({"temperature": t, "prompt": p, "groups": groups[p], "samples": n,
                  "right": int(right), "distinct": int(distinct)}) + "\n"
      for t, n, row in rows for p, (right, distinct) in enumerate(row)
  ))


def random_counts(rng, prompts, chance, k=4, spread=1.0):
  """Right more often and less varied from temperature to temperature."""
  out = []
  for t in range(len(TEMPERATURES)):
    right = rng.binomial(k, np.clip(chance + 0.15 * t, 0, 1), prompts)
    distinct = [len(set(rng.integers(0, 1 + int(spread * 9 / (t + 1) ** 3), n))) for n in right]
    out.append(list(zip(right, distinct)))
  return out


# --- Independent references -----------------------------------------------------------------------


def slow_curve(points):
  """The least x, the largest x, and the function, of (x, y) points."""
  points = sorted(points)
  raised = [(x, max(y for _, y in points[i:])) for i, (x, _) in enumerate(points)]

  def value(x):
    for (x0, y0), (x1, y1) in zip(raised, raised[1:]):
      if x0 <= x <= x1 and x1 > x0:
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return raised[-1][1]

  return raised[0][0], raised[-1][0], value


def slow_difference(a, b, n=4_000):
  """The mean difference of two lists of points over their common range, on a fine grid."""
  (low_a, high_a, f), (low_b, high_b, g) = slow_curve(a), slow_curve(b)
  low, high = max(low_a, low_b), min(high_a, high_b)
  if high - low <= 1e-9:
    return np.nan
  xs = low + (high - low) * (np.arange(n) + 0.5) / n
  return float(np.mean([f(x) - g(x) for x in xs]))


def points_of(counts, chosen, k=4):
  """(accuracy, coverage) at each temperature, over the prompts that were chosen."""
  return [
      (np.mean([row[p][0] / k for p in chosen]), np.mean([row[p][1] for p in chosen]))
      for row in counts
  ]


# --- Counts ---------------------------------------------------------------------------------------


def test_counts_by_hand(tmp_path):
  groups = [["add", "unique"], ["word", "varied"], ["pick", "varied"], ["sort", "unique"]]
  counts = [[(0, 0), (2, 2), (4, 3), (1, 1)], [(4, 1), (4, 1), (4, 2), (0, 0)],
            [(4, 1), (4, 1), (4, 1), (4, 1)]]
  write(tmp_path, "sft", counts, groups=groups, greedy=[(1, 1), (1, 1), (0, 0), (0, 0)])
  found = summarize([tmp_path], ["sft", "dpr"])
  assert (found["k"], found["prompts"]) == (4, 4)
  assert found["temperatures"] == [1.0, 0.7, 0.5, 0.0]
  curve = found["curves"]["sft"]
  assert [p["temperature"] for p in curve] == found["temperatures"]
  assert [p["accuracy"]["mean"] for p in curve] == pytest.approx([7 / 16, 12 / 16, 1, 1 / 2])
  assert [p["coverage"]["mean"] for p in curve] == [2.5, 1.5, 1, 0.5]
  assert [p["pass_at_k"]["mean"] for p in curve] == [0.5, 0.5, 1, 0.5]
  assert [curve[0][key]["n"] for key in ("accuracy", "coverage", "pass_at_k")] == [4, 2, 2]
  assert all(0 <= p["accuracy"]["ci95"][0] <= p["accuracy"]["ci95"][1] <= 1 for p in curve)
  assert found["equal_accuracy"] == {} and list(found["curves"]) == ["sft"]


def test_without_groups_all_prompts_count(tmp_path):
  write(tmp_path, "sft", [[(1, 1), (4, 3)]] * 3)
  (first, *_) = summarize([tmp_path], ["sft"])["curves"]["sft"]
  assert first["coverage"] == {**first["coverage"], "mean": 2.0, "n": 2}
  assert first["pass_at_k"] == {**first["pass_at_k"], "mean": 1.0, "n": 2}


def test_only_systems_of_every_seed(tmp_path, rng):
  for s in range(2):
    write(tmp_path / str(s), "dpr", random_counts(rng, 6, 0.5))
  write(tmp_path / "0", "sft", random_counts(rng, 6, 0.5))
  found = summarize([tmp_path / "0", tmp_path / "1"], ["sft", "dpr"])
  assert list(found["curves"]) == ["dpr"] and "equal_accuracy" not in found
  assert found["curves"]["dpr"][0]["accuracy"]["n"] == 12
  assert summarize([tmp_path / "none"], ["sft"]) == {}


# --- Differences ----------------------------------------------------------------------------------


def test_differences_of_curves_by_hand():
  line = (np.array([[0.2, 0.6]]), np.array([[4.0, 2.0]]))
  above = (np.array([[0.4, 0.8]]), np.array([[4.0, 2.0]]))
  gap, low, high = mean_difference(above, line)  # 4 - 3 at 0.4, 3 - 2 at 0.6.
  np.testing.assert_allclose([gap, low, high], [[1.0], [0.4], [0.6]])
  # An arch: below its peak, the peak is what is reached at the accuracy or a higher one.
  arch = (np.array([[0.0, 0.4, 0.8]]), np.array([[1.0, 3.0, 1.0]]))
  flat = (np.array([[0.0, 0.8]]), np.array([[0.0, 0.0]]))
  np.testing.assert_allclose(mean_difference(arch, flat)[0], [(0.4 * 3 + 0.4 * 2) / 0.8])
  # Temperatures of one accuracy: the better one counts.
  tied = (np.array([[0.0, 0.4, 0.4, 0.8]]), np.array([[3.0, 1.0, 3.0, 1.0]]))
  np.testing.assert_allclose(mean_difference(tied, flat)[0], [(0.4 * 3 + 0.4 * 2) / 0.8])
  apart = (np.array([[0.7, 0.9]]), np.array([[1.0, 0.0]]))
  assert np.isnan(mean_difference(apart, line)[0]).all()
  one = (np.array([[0.5]]), np.array([[1.0]]))
  assert np.isnan(mean_difference(one, line)[0]).all()


def test_differences_of_curves_against_a_fine_grid(rng):
  (xa, ya, xb, yb) = rng.random((4, 20, 5)).round(1)  # with ties.
  gap, *_ = mean_difference((xa, ya), (xb, yb))
  slow = [slow_difference(list(zip(*a)), list(zip(*b))) for a, b in
          zip(zip(xa, ya), zip(xb, yb))]
  np.testing.assert_allclose(gap, slow, atol=2e-3)
  np.testing.assert_allclose(mean_difference((xb, yb), (xa, ya))[0], -gap, atol=1e-12)
  np.testing.assert_array_equal(mean_difference((xa, ya), (xa, ya))[0], 0.0)


def test_resamples_against_a_loop(tmp_path, rng, monkeypatch):
  monkeypatch.setattr(frontier, "RESAMPLES", 60)
  frontier._weights.cache_clear()
  sft, other = random_counts(rng, 30, 0.5), random_counts(rng, 30, 0.55, spread=2)
  # Alike in two thirds of the prompts, so that most resamples have a range in common.
  counts = {"sft": sft, "dpr": [row[:20] + new[20:] for row, new in zip(sft, other)]}
  for name, of in counts.items():
    write(tmp_path, name, of)
  found = summarize([tmp_path], counts)
  for key, swap in (("equal_accuracy", False), ("equal_coverage", True)):
    gaps = []
    for weights in frontier._weights(30):
      chosen = np.repeat(np.arange(30), weights.astype(int))
      a, b = (points_of(counts[n], chosen) for n in ("dpr", "sft"))
      if swap:
        a, b = ([(y, x) for x, y in points] for points in (a, b))
      gaps.append(slow_difference(a, b, 400))
    assert found[key]["dpr"]["difference"] == pytest.approx(gaps[0], abs=1e-2)
    np.testing.assert_allclose(
        found[key]["dpr"]["ci95"], np.nanquantile(gaps[1:], [0.025, 0.975]), atol=1e-2
    )
  frontier._weights.cache_clear()


def test_resamples_against_all_of_them(tmp_path):
  """Five prompts have 3,125 resamples, whose shares are known exactly."""
  sft = [[(1, 1), (2, 2), (1, 1), (2, 1), (1, 1)], [(2, 1), (3, 2), (2, 1), (3, 2), (2, 1)],
         [(4, 1), (4, 2), (3, 1), (4, 1), (4, 1)]]
  dpr = [[(1, 1), (2, 2), (2, 2), (2, 1), (1, 1)], [(2, 2), (3, 1), (3, 2), (3, 1), (2, 2)],
         [(4, 1), (4, 1), (4, 2), (4, 2), (4, 1)]]
  write(tmp_path, "sft", sft)
  write(tmp_path, "dpr", dpr)
  found = summarize([tmp_path], ["sft", "dpr"])["equal_accuracy"]["dpr"]
  exact = {}
  gaps = []
  for chosen in itertools.product(range(5), repeat=5):
    key = tuple(sorted(chosen))
    if key not in exact:
      exact[key] = slow_difference(points_of(dpr, key), points_of(sft, key), 200)
    gaps.append(exact[key])
  gaps = np.array(gaps)
  low, high = found["ci95"]
  assert np.mean(gaps < low - 1e-2) < 0.035 and np.mean(gaps < low + 1e-2) > 0.015
  assert np.mean(gaps > high + 1e-2) < 0.035 and np.mean(gaps > high - 1e-2) > 0.015
  p = 2 * min(np.mean(gaps <= 1e-9), np.mean(gaps >= -1e-9))
  assert found["p"] == pytest.approx(min(1, p), abs=0.05)


def test_a_system_against_itself(tmp_path, rng):
  for s in range(3):
    counts = random_counts(rng, 20, 0.4)
    for name in ("sft", "same"):
      write(tmp_path / str(s), name, counts)
  for seeds in (1, 3):
    found = summarize([tmp_path / str(s) for s in range(seeds)], ["sft", "same"])
    for key in ("equal_accuracy", "equal_coverage"):
      entry = found[key]["same"]
      assert entry["difference"] == 0 and entry["ci95"] == [0, 0] and entry["p"] == 1


def answers(rng, logits_PxA, temperature, k):
  """(right, distinct) of k sampled answers to each prompt; the first half of them are right."""
  scaled = logits_PxA / temperature
  p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
  half = logits_PxA.shape[1] // 2
  drawn = [rng.choice(len(row), k, p=row / row.sum()) for row in p]
  return [(int(np.sum(d < half)), len({x for x in d if x < half})) for d in drawn]


def test_sharpening_moves_along_the_curve_and_learning_leaves_it(tmp_path, rng):
  logits = rng.normal(size=(300, 12))
  logits[:, :6] += 1.2
  learnt = logits.copy()
  learnt[:, :6] += 0.3  # All right answers alike: as varied as they were.
  k, cold = 8, 1.2
  systems = {"sft": logits, "sharpened": logits * cold, "learnt": learnt}
  for name, of in systems.items():
    write(tmp_path, name, [answers(rng, of, t, k) for t in TEMPERATURES], k=k)
  found = summarize([tmp_path], systems)
  for key in ("equal_accuracy", "equal_coverage"):
    entry = found[key]["sharpened"]
    error = np.diff(entry["ci95"])[0] / 3.92
    assert abs(entry["difference"]) < 4 * error + 0.02, key
    assert found[key]["learnt"]["ci95"][0] > 0 and found[key]["learnt"]["p"] < 0.05, key
  # At one temperature, sharpening looks like learning.
  same = found["equal_temperature"]["sharpened"]
  assert same["temperature"] == 1 and same["accuracy"]["difference"] > 0
  ends = found["equal_accuracy"]["learnt"]["accuracy"]
  curve = lambda name: [p["accuracy"]["mean"] for p in found["curves"][name][:-1]]
  expected = [max(min(curve(n)) for n in ("sft", "learnt")),
              min(max(curve(n)) for n in ("sft", "learnt"))]
  assert ends == pytest.approx(expected)


def test_curves_that_do_not_meet_have_a_reason(tmp_path):
  write(tmp_path, "sft", [[(1, 1)] * 8, [(1, 1), *[(2, 1)] * 7], [(2, 1)] * 8])
  write(tmp_path, "dpr", [[(3, 2)] * 8, [(3, 2), *[(4, 1)] * 7], [(4, 1)] * 8])
  found = summarize([tmp_path], ["sft", "dpr"])
  assert found["equal_accuracy"]["dpr"] == {
      "difference": None, "reason": "its accuracy is above that of SFT at every temperature"
  }
  assert found["equal_coverage"]["dpr"]["reason"] == "the two have no range of coverage in common"
  # They touch by chance.
  sft = [[(0, 0)] * 8, [(1, 1)] * 8, [*[(2, 1)] * 7, (4, 1)]]
  dpr = [[(2, 2)] * 8, [(3, 2)] * 8, [(4, 1)] * 8]
  write(tmp_path, "sft", sft)
  write(tmp_path, "dpr", dpr)
  reason = summarize([tmp_path], ["sft", "dpr"])["equal_accuracy"]["dpr"]["reason"]
  assert reason.startswith("the two have a range of accuracy in common in only 6")


def test_greedy_decoding_is_no_part_of_the_difference(tmp_path, rng):
  counts = {"sft": random_counts(rng, 20, 0.4), "dpr": random_counts(rng, 20, 0.45)}
  found = []
  for greedy in ((0, 0), (1, 1)):
    for name, of in counts.items():
      write(tmp_path, name, of, greedy=[greedy] * 20)
    found.append(summarize([tmp_path], counts))
  assert [f["curves"]["dpr"][-1]["accuracy"]["mean"] for f in found] == [0, 1]
  for key in ("equal_accuracy", "equal_coverage", "equal_temperature"):
    assert found[0][key] == found[1][key]


def test_several_seeds_are_paired_and_averaged(tmp_path, rng):
  folders = [tmp_path / str(s) for s in range(3)]
  for folder in folders:
    write(folder, "sft", random_counts(rng, 40, 0.4))
    write(folder, "dpr", random_counts(rng, 40, 0.4, spread=3))
  each = [summarize([f], ["sft", "dpr"])["equal_accuracy"]["dpr"] for f in folders]
  found = summarize(folders, ["sft", "dpr"])["equal_accuracy"]["dpr"]
  assert found["difference"] == pytest.approx(np.mean([e["difference"] for e in each]))
  assert found["accuracy"] == pytest.approx(np.mean([e["accuracy"] for e in each], axis=0))
  assert (found["p"] < 0.05) == (not found["ci95"][0] <= 0 <= found["ci95"][1])


# --- The bootstrap --------------------------------------------------------------------------------


def test_one_seed_has_percentiles_and_a_p_that_is_never_0(rng):
  draws = rng.normal(1.0, 0.5, 999)
  found = bootstrapped(np.array([1.0]), draws[None], 50)
  np.testing.assert_allclose(found["ci95"], np.quantile(draws, [0.025, 0.975]))
  assert found["p"] == pytest.approx(2 * (np.sum(draws <= 0) + 1) / 1000)
  assert bootstrapped(np.array([1.0]), np.abs(draws)[None] + 1, 50)["p"] == 2 / 1000
  with_gaps = np.append(draws, [np.nan] * 10)
  assert bootstrapped(np.array([1.0]), with_gaps[None], 50) == found
  mirrored = bootstrapped(np.array([-1.0]), -draws[None], 50)
  np.testing.assert_allclose(mirrored["ci95"], [-x for x in reversed(found["ci95"])])
  assert mirrored["p"] == found["p"]
  assert np.isnan(bootstrapped(np.array([1.0]), draws[None], 1)["p"])


@pytest.mark.parametrize("seed_effect,prompt_effect", [(0.0, 1.0), (0.3, 1.0), (1.0, 0.1)])
def test_several_seeds_keep_their_coverage(rng, seed_effect, prompt_effect):
  """Means over 3 seeds and 30 shared prompts, whose true value is 0."""
  prompts, hits = 30, []
  weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), 300) / prompts
  for _ in range(400):
    table = prompt_effect * rng.normal(size=prompts) + seed_effect * rng.normal(size=(3, 1))
    table = table + 0.5 * rng.normal(size=(3, prompts))
    found = bootstrapped(table.mean(axis=1), table @ weights.T, prompts)
    hits.append(found["ci95"][0] <= 0 <= found["ci95"][1])
    assert hits[-1] == (found["p"] >= 0.05)
  assert np.mean(hits) > 0.91
