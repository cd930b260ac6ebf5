"""Intervals that cover, p-values that are calibrated: by simulation, enumeration and formulas."""

import itertools
import math

import numpy as np
import pytest

from dpr_jax.evaluation import statistics
from dpr_jax.evaluation.statistics import compare, interval, share


def table(rng, seeds, prompts, seed_sd=0.0, prompt_sd=0.0, shared=True):
  """Values of expectation 0: seed effects, prompt effects (shared by the seeds or not), noise."""
  prompt = rng.normal(0, prompt_sd, (1 if shared else seeds, prompts))
  return list(rng.normal(0, seed_sd, (seeds, 1)) + prompt + rng.normal(size=(seeds, prompts)))


def binary_table(rng, seeds, prompts, p, seed_sd=0.0, prompt_sd=0.0):
  chance = p + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, prompt_sd, (1, prompts))
  return list((rng.random((seeds, prompts)) < chance).astype(float))


def coverage(make, truth, draws=4_000):
  """Share of intervals that hold the truth; its standard error is 0.0035 at 0.95."""
  intervals = [interval(make())["ci95"] for _ in range(draws)]
  return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_one_seed_of_scores_is_covered(p):
  rng = np.random.default_rng(int(100 * p))
  assert 0.93 <= coverage(lambda: binary_table(rng, 1, 100, p), p) <= 0.97


def test_a_share_has_wilsons_interval_also_with_ties(rng):
  """A bound is a share that the score test, (p - b)^2 = z^2 b (1 - b) / n, just does not reject."""
  values = rng.choice([0.0, 0.5, 1.0], 50)
  found, p = share(values), values.mean()
  for b in found["ci95"]:
    assert (p - b) ** 2 == pytest.approx(1.959964**2 * b * (1 - b) / 50, rel=1e-5)
  assert found["mean"] == p and found["ci95"][0] < p < found["ci95"][1] and found["n"] == 50
  binary = np.floor(values)
  assert share(binary) == interval([binary])


def test_one_seed_of_lengths_is_covered():
  rng = np.random.default_rng(1)
  assert 0.93 <= coverage(lambda: [rng.gamma(4.0, 2.0, 60)], 8.0) <= 0.97


@pytest.mark.parametrize(
  "seeds, seed_sd, prompt_sd, shared",
  [(3, 0.3, 0.0, True), (3, 0.0, 1.5, True), (3, 0.3, 1.0, False), (5, 0.15, 1.0, True)],
)
def test_several_seeds_are_covered(seeds, seed_sd, prompt_sd, shared):
  rng = np.random.default_rng(seeds)
  got = coverage(lambda: table(rng, seeds, 64, seed_sd, prompt_sd, shared), 0.0)
  assert 0.93 <= got <= 0.97


def test_several_seeds_of_scores_are_covered():
  rng = np.random.default_rng(3)
  got = coverage(lambda: binary_table(rng, 5, 100, 0.6, seed_sd=0.05, prompt_sd=0.1), 0.6)
  assert 0.93 <= got <= 0.97


def test_seeds_that_do_not_differ_never_cost_coverage():
  rng = np.random.default_rng(4)
  got = coverage(lambda: binary_table(rng, 3, 100, 0.5), 0.5)
  assert 0.95 <= got <= 0.99


def test_treating_seeds_as_more_prompts_would_not_cover():
  """The simulation can fail: pooling all values of seeds that differ covers far less."""
  rng = np.random.default_rng(5)
  got = coverage(lambda: [np.concatenate(table(rng, 3, 64, seed_sd=0.3))], 0.0, draws=1_000)
  assert got < 0.8


def test_one_seed_against_the_formulas():
  x = np.random.default_rng(6).normal(3.0, 2.0, 17)
  got = interval([x])
  half = 2.119905299221011 * x.std(ddof=1) / math.sqrt(17)  # the 0.975 quantile of t with 16 df.
  assert got["n"] == 17 and got["mean"] == pytest.approx(x.mean(), rel=1e-12)
  assert got["ci95"] == pytest.approx([x.mean() - half, x.mean() + half], rel=1e-9)
  # Wilson's interval solves |p - mean| = z sqrt(p (1 - p) / n).
  scores = np.array([1.0] * 13 + [0.0] * 4)
  for bound in interval([scores])["ci95"]:
    assert abs(bound - 13 / 17) == pytest.approx(
      1.959963984540054 * math.sqrt(bound * (1 - bound) / 17), rel=1e-9
    )


def test_seed_means_alone_when_each_seed_has_one_value():
  x = np.array([1.0, 2.5, 4.0])
  half = 4.302652729911275 * x.std(ddof=1) / math.sqrt(3)
  assert interval(x[:, None])["ci95"] == pytest.approx([2.5 - half, 2.5 + half], rel=1e-9)


def test_scores_stay_within_0_and_1_and_are_never_certain():
  for seeds in (1, 2, 3):
    for value in (0.0, 1.0):
      low, high = interval([np.full(50, value)] * seeds)["ci95"]
      assert 0 <= low < high <= 1 and high - low == pytest.approx(0.0713, abs=1e-3)
  low, high = interval([np.ones(20), np.zeros(20)])["ci95"]
  assert (low, high) == pytest.approx((0, 1), abs=0.02)


def test_more_seeds_and_more_prompts_narrow_the_interval():
  rng = np.random.default_rng(7)

  def width(seeds, prompts):
    return np.mean([np.diff(interval(table(rng, seeds, prompts, 0.2))["ci95"]) for _ in range(50)])

  assert width(8, 64) < 0.6 * width(3, 64)
  assert width(3, 16) > width(3, 256)


def test_seeds_that_agree_by_luck_are_not_certain():
  x = np.array([1.0, 0.0] * 30)
  low, high = interval([x, x[::-1], x])["ci95"]  # equal means: no variance between seeds.
  assert high - low >= 2 * 1.9 * 0.5 / math.sqrt(3 * 60)


def test_seeds_may_have_different_prompts():
  rng = np.random.default_rng(8)
  got = interval([rng.normal(size=30), rng.normal(size=20), rng.normal(size=25)])
  assert got["n"] == 75 and got["ci95"][0] < got["mean"] < got["ci95"][1]


@pytest.mark.parametrize(
  "bad", [[], [np.array([])], [np.zeros((2, 2))], [np.array([1.0, np.nan])], [np.array(1.0)]]
)
def test_what_cannot_be_averaged_is_refused(bad):
  with pytest.raises(ValueError, match="per_seed"):
    interval(bad)


def test_a_single_value_has_no_interval():
  got = interval([np.array([3.5])])
  assert got["mean"] == 3.5 and np.all(np.isnan(got["ci95"]))


# --- comparisons ----------------------------------------------------------------------------------


def enumerated_p(differences):
  """Two-sided sign-flip p over all 2^n signs, in a plain loop."""
  observed = abs(sum(differences))
  flips = itertools.product((-1, 1), repeat=len(differences))
  sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in flips]
  return sum(s >= observed - 1e-9 for s in sums) / len(sums)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_p_is_exact_on_few_prompts(n):
  rng = np.random.default_rng(n)
  a, b = rng.normal(0.5, 1, n), rng.normal(size=n)
  assert compare([a], [b])["p"] == pytest.approx(enumerated_p(a - b), rel=1e-12)
  a, b = (rng.random((2, n)) < 0.5).astype(float)
  assert compare([a], [b])["p"] == pytest.approx(enumerated_p(a - b), rel=1e-12)


def test_p_of_scores_is_mcnemar_exact():
  a = np.array([1.0] * 21 + [0.0] * 8 + [1.0] * 70)
  b = np.array([0.0] * 21 + [1.0] * 8 + [1.0] * 70)
  tail = sum(math.comb(29, k) for k in range(9)) / 2**29
  assert compare([a], [b])["p"] == pytest.approx(2 * tail, rel=1e-12)


def test_drawn_p_agrees_with_enumeration():
  rng = np.random.default_rng(9)
  a, b = rng.normal(0.55, 1, 15), rng.normal(size=15)
  exact = enumerated_p(a - b)
  assert 0.01 < exact < 0.3
  assert compare([a], [b], seed=1)["p"] == pytest.approx(exact, abs=4 * math.sqrt(exact / 9_999))
  assert compare([a], [b], seed=1) == compare([a], [b], seed=1)


def test_p_is_never_zero():
  a, b = np.linspace(5, 9, 40), np.zeros(40)
  assert compare([a], [b])["p"] == 1e-4
  assert compare([a] * 3, [b] * 3)["p"] == 1e-4
  assert 0 < compare([np.ones(400)], [np.zeros(400)])["p"] < 1e-100


@pytest.mark.parametrize("seeds, seed_sd", [(1, 0.0), (3, 0.4)])
def test_p_is_uniform_when_there_is_no_difference(seeds, seed_sd, monkeypatch):
  monkeypatch.setattr(statistics, "FLIPS", 399)  # keeps the p-values on a grid of 1 / 400.
  rng = np.random.default_rng(10 + seeds)
  ps = []
  for i in range(2_000):
    base = rng.normal(0, 2, 40)  # prompts of different difficulty, shared by both systems.
    a = [base + x for x in table(rng, seeds, 40, seed_sd)]
    b = [base + x for x in table(rng, seeds, 40)]
    ps.append(compare(a, b, seed=i)["p"])
  ps = np.sort(ps)
  # Kolmogorov's distance to the uniform distribution: 1.63 / sqrt(2000) at the 1% level.
  gap = np.abs(ps - (np.arange(2_000) + 0.5) / 2_000).max()
  assert gap < 0.0365 + 1 / 400
  assert np.mean(ps <= 0.05) == pytest.approx(0.05, abs=0.015)


def test_p_of_scores_is_valid_when_there_is_no_difference():
  rng = np.random.default_rng(11)
  ps = []
  for _ in range(3_000):
    chance = rng.random(80)
    a, b = (rng.random((2, 80)) < chance).astype(float)
    ps.append(compare([a], [b])["p"])
  for level in (0.01, 0.05, 0.2):  # discrete, so at most the level, and not far below it.
    assert 0.4 * level <= np.mean(np.array(ps) <= level) <= 1.25 * level


@pytest.mark.parametrize("seeds, seed_sd", [(1, 0.0), (3, 0.06)])
def test_differences_of_scores_are_covered(seeds, seed_sd):
  rng = np.random.default_rng(20 + seeds)
  hits = []
  for _ in range(3_000):
    chance = 0.3 + 0.4 * rng.random(100)
    up = 0.1 + rng.normal(0, seed_sd, (seeds, 1))
    a = (rng.random((seeds, 100)) < chance + up).astype(float)
    b = (rng.random((seeds, 100)) < chance).astype(float)
    low, high = compare(a, b)["ci95"]
    hits.append(low <= 0.1 <= high)
  assert 0.93 <= np.mean(hits) <= 0.97


def test_pairing_removes_what_the_prompts_share():
  rng = np.random.default_rng(12)
  base = rng.normal(0, 10, 50)
  a, b = base + 1 + rng.normal(0, 0.1, 50), base + rng.normal(0, 0.1, 50)
  got = compare([a], [b])
  assert got["difference"] == pytest.approx(1, abs=0.1) and got["ci95"][0] > 0.9
  assert got["p"] < 1e-3


def test_few_differing_scores_do_not_give_a_narrow_interval():
  b = np.zeros(100)
  got = compare([b], [b])
  assert got["difference"] == 0 and got["p"] == 1
  # Agresti and Min: one pseudo-difference each way among n + 2.
  assert got["ci95"] == pytest.approx(np.array([-1, 1]) * 1.98 / 102, rel=0.02)


def test_swapping_the_systems_swaps_the_sign():
  rng = np.random.default_rng(13)
  a, b = table(rng, 3, 30), table(rng, 3, 30)
  one, other = compare(a, b), compare(b, a)
  assert one["difference"] == pytest.approx(-other["difference"])
  assert one["ci95"] == pytest.approx([-x for x in reversed(other["ci95"])])
  assert one["p"] == pytest.approx(other["p"])


def test_what_cannot_be_paired_is_refused():
  with pytest.raises(ValueError, match="2 seeds .* 1"):
    compare([np.ones(3)] * 2, [np.ones(3)])
  with pytest.raises(ValueError, match="seed 1: 3 values of a and 4 of b"):
    compare([np.ones(3)] * 2, [np.ones(3), np.ones(4)])


@pytest.mark.parametrize("df", [1, 2, 2.7, 9, 63.4, 5_000])
def test_students_t_against_scipy(df):
  scipy_stats = pytest.importorskip("scipy.stats")
  assert statistics.t_quantile(df) == pytest.approx(scipy_stats.t.ppf(0.975, df), rel=1e-10)
  for t in (0.0, 0.1, 1.0, 2.5, 30.0):
    assert statistics._t_tail(t, df) == pytest.approx(2 * scipy_stats.t.sf(t, df), rel=1e-9)
