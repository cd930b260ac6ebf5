"""What falls below zero once SFT is done: propositions (a) to (d) of docs/cleaning_theory.md."""

import math

import numpy as np
import pytest

from dpr_jax.evaluation.cleaning import summarize
from dpr_jax.methods.cleaned_sft import CleanedSFT
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.cleaning import cut_shares, descend, log_ratio, right_and_wrong, token_mass
from dpr_jax.theory.mdp import by_prompt, per_token, sequence_logp
from dpr_jax.theory.objectives import baseline_relative, sft_loss
from dpr_jax.theory.optimum import as_policy
from dpr_jax.theory.values import sequence_kl

NEVER = -40.0  # a logit of what a policy that has learned the form does not say.


# --- The shares ---------------------------------------------------------------------------------


def test_the_shares_are_those_of_the_method_and_its_report(make_instance, rng, random_demos):
  mdp = make_instance(1, 3, 3).mdp
  counts = rng.multinomial(60, random_demos(mdp))
  wrong = rng.random(len(counts)) < 0.5
  wrong[:2] = True, False
  counts[:2] += 1
  rewards = rng.normal(size=len(counts))
  rewards[0] = 0.0  # is kept.
  got = cut_shares(mdp, counts / counts.sum(), wrong, rewards)
  lines = [
      {"judged": True, "reward_sum": rewards[y], "wrong": bool(wrong[y])}
      for y in np.repeat(np.arange(len(counts)), counts)
  ]
  expected = summarize([CleanedSFT().decide(lines, None, 0)])
  for name in ("cut", "wrong_cut", "wrong_kept"):
    if name in expected:
      assert got[name] == pytest.approx(expected[name]["mean"], abs=1e-12), name
  e = np.sum(counts * wrong) / counts.sum()
  assert got["cut"] == pytest.approx(e * got["wrong_found"] + (1 - e) * got["right_lost"])


# --- (a) The mean ---------------------------------------------------------------------------------


def test_the_mean_reward_is_the_fall_of_the_held_out_loss(make_instance, random_demos):
  i = make_instance(3, 3, 4)
  demos = random_demos(i.mdp)
  p, r = as_policy(i.mdp, np.log(demos)), log_ratio(i.mdp, i.sft, i.ref)
  fall_P = sequence_kl(i.mdp, p, i.ref) - sequence_kl(i.mdp, p, i.sft)
  np.testing.assert_allclose(by_prompt(i.mdp, demos * r), fall_P, atol=1e-12)
  loss = [sft_loss(i.mdp, x, demos) for x in (i.ref, i.sft)]
  assert fall_P.mean() == pytest.approx(loss[0] - loss[1], abs=1e-12)
  # Of responses of sft itself it is never negative, of those of ref never positive.
  for own, sign, other in ((i.sft, 1, i.ref), (i.ref, -1, i.sft)):
    mean_P = by_prompt(i.mdp, np.exp(sequence_logp(i.mdp, own)) * r)
    np.testing.assert_allclose(mean_P, sign * sequence_kl(i.mdp, own, other), atol=1e-12)
    assert np.all(sign * mean_P > 0)


def test_no_cut_of_the_likelihood_is_right_for_prompts_with_few_and_with_many_answers(rng):
  """4 plausible answers, 3 right; 12 plausible, 8 right: 0 is the cut of r for both."""
  mdp, e = TokenMDP(2, 12, 1), rng.uniform(0.13, 0.22)
  few, wrong_few = right_and_wrong(4, 3, e)
  many, wrong_many = right_and_wrong(12, 8, e)
  demos = np.concatenate([few, np.zeros(8), many])
  wrong = np.concatenate([wrong_few, np.zeros(8, bool), wrong_many])
  start = np.zeros((2, 12))
  start[0, 4:] = NEVER
  ref, sft = descend(token_mass(mdp, demos), start, [1, 2000], 0.5)
  logp, r = sequence_logp(mdp, sft), log_ratio(mdp, sft, ref)
  right = ~wrong & (demos > 0)
  assert logp[right].min() < logp[wrong].max() - 0.05
  assert r[right].min() > 0.01 and r[wrong].max() < -0.01
  shares = cut_shares(mdp, demos, wrong, r)
  assert shares["cut"] == pytest.approx(e, abs=1e-12)
  assert shares["wrong_cut"] == pytest.approx(1)


def test_what_ref_and_sft_share_drops_out_of_the_reward_and_not_of_the_likelihood(
    make_instance, rng
):
  """A first token with the same law in both, such as a turn of phrase."""
  i = make_instance(1, 4, 3)
  sft, ref = i.sft.copy(), i.ref.copy()
  ref[0] = sft[0]
  moved = rng.normal(size=4)
  other = [np.concatenate([x[:1] + moved, x[1:]]) for x in (sft, ref)]
  np.testing.assert_allclose(
      log_ratio(i.mdp, *other), log_ratio(i.mdp, sft, ref), atol=1e-12
  )
  assert np.abs(sequence_logp(i.mdp, other[0]) - sequence_logp(i.mdp, sft)).max() > 0.05


@pytest.mark.parametrize("right, share, said", [
    (0, 0.2, "right=0"), (4, 0.2, "right=4"), (1, 1.5, "wrong_share=1.5"),
])
def test_impossible_answers_are_refused(right, share, said):
  with pytest.raises(ValueError, match=said):
    right_and_wrong(4, right, share)


# --- (b) The population optimum -------------------------------------------------------------------


def test_sft_run_to_its_optimum_cuts_what_is_less_likely_in_the_demos_than_under_ref(
    make_instance, random_demos
):
  i = make_instance(2, 3, 2)
  # None is so rare that it would take long to learn.
  demos = 0.8 * random_demos(i.mdp)
  demos += 0.2 / by_prompt(i.mdp, np.ones(len(demos)))[i.mdp.responses.prompts_Y]
  sft, = descend(token_mass(i.mdp, demos), i.ref, [6000], 2.0)
  r, expected = log_ratio(i.mdp, sft, i.ref), np.log(demos) - sequence_logp(i.mdp, i.ref)
  np.testing.assert_allclose(r, expected, atol=1e-3)
  sure = np.abs(expected) > 1e-2
  assert sure.sum() > 5
  below = demos < np.exp(sequence_logp(i.mdp, i.ref))
  np.testing.assert_array_equal(r[sure] < 0, below[sure])


@pytest.mark.parametrize("factor", [0.2, 0.95, 1.0, 1.05, 1.6])
def test_exactly_the_wrong_are_cut_where_ref_is_more_often_wrong_than_the_demos(
    make_instance, rng, factor
):
  """And exactly the right ones where it is less often wrong. ref need not be uniform."""
  i = make_instance(2, 3, 4)
  ref_Y = np.exp(sequence_logp(i.mdp, i.ref))
  wrong = np.zeros(len(ref_Y), bool)
  for p in range(2):  # Both kinds for each prompt, and room for 1.6 times the wrong ones.
    own = rng.permutation(np.flatnonzero(i.mdp.responses.prompts_Y == p))
    own = own[own != own[np.argmax(ref_Y[own])]]
    wrong[own[np.cumsum(ref_Y[own]) < 0.5]] = True
    wrong[own[np.argmin(ref_Y[own])]] = True
  ref_wrong_Y = by_prompt(i.mdp, ref_Y * wrong)[i.mdp.responses.prompts_Y]
  e_Y = factor * ref_wrong_Y
  # The same within the right and within the wrong ones, but another share of wrong ones.
  demos = ref_Y * np.where(wrong, e_Y / ref_wrong_Y, (1 - e_Y) / (1 - ref_wrong_Y))
  r = log_ratio(i.mdp, as_policy(i.mdp, np.log(demos)), i.ref)
  expected = np.where(wrong, math.log(factor), np.log((1 - e_Y) / (1 - ref_wrong_Y)))
  np.testing.assert_allclose(r, expected, atol=1e-10)
  if factor == 1.0:
    return  # All rewards are 0.
  shares, e = cut_shares(i.mdp, demos, wrong, r), np.sum(demos * wrong) / 2
  assert shares["cut"] == pytest.approx(e if factor < 1 else 1 - e, abs=1e-12)
  assert shares["wrong_cut"] == pytest.approx(1 if factor < 1 else 0)


@pytest.mark.parametrize("answers, right", [(8, 1), (8, 5), (20, 3)])
def test_a_uniform_ref_has_its_threshold_at_the_share_of_wrong_answers(answers, right):
  """W plausible answers, R right: 1 - R / W; and after any number of steps, not only in the end."""
  mdp, threshold = TokenMDP(1, answers, 1), 1 - right / answers
  for factor in (0.1, 0.9, 1.0, 1.0 + 0.5 * (1 / threshold - 1)):
    e = factor * threshold
    demos, wrong = right_and_wrong(answers, right, e)
    # The two inequalities are one.
    assert factor == 1 or (
        ((1 - e) / right > 1 / answers) == (e / (answers - right) < 1 / answers) == (factor < 1)
    )
    path = descend(token_mass(mdp, demos), np.zeros((1, answers)), [0, 1, 3, 30, 300], 1.0)
    r = log_ratio(mdp, path[1:], path[0])
    if factor == 1:
      np.testing.assert_allclose(r, 0, atol=1e-12)
      continue
    np.testing.assert_array_equal(r < 0, np.tile(wrong if factor < 1 else ~wrong, (4, 1)))
    shares = cut_shares(mdp, demos, wrong, r)
    np.testing.assert_allclose(shares["cut"], e if factor < 1 else 1 - e, atol=1e-12)


# --- (c) Systematic slips -------------------------------------------------------------------------


@pytest.mark.parametrize("answers, right, e", [(12, 1, 0.3), (12, 2, 0.45), (20, 3, 0.22)])
def test_slips_are_kept_where_they_share_at_most_e_times_w_answers(answers, right, e):
  mdp, start = TokenMDP(1, answers, 1), np.zeros((1, answers))
  spreads, wrong = np.arange(1, answers - right + 1), np.arange(answers) >= right
  demos = np.tile(np.where(wrong, 0.0, (1 - e) / right), (len(spreads), 1))
  for row, spread in enumerate(spreads):
    demos[row, right : right + spread] = e / spread
  sft, = descend(token_mass(mdp, demos), start, [4000], 2.0)
  r, kept = log_ratio(mdp, sft, start), spreads <= e * answers
  assert 0 < kept.sum() < len(kept)  # There are slips of both kinds.
  for row, is_kept in enumerate(kept):
    shares = cut_shares(mdp, demos[row], wrong, r[row])
    assert shares["cut"] == pytest.approx(0 if is_kept else e, abs=1e-12), spreads[row]
    assert shares["wrong_found"] == pytest.approx(float(not is_kept), abs=1e-12)


def test_the_share_below_zero_leaves_out_the_slips_that_are_alike():
  """15% spread over all wrong answers, 10% on one of them: 15% are cut."""
  mdp, start = TokenMDP(1, 20, 1), np.zeros((1, 20))
  demos, wrong = right_and_wrong(20, 4, 0.15)
  demos[~wrong] *= 0.75 / 0.85
  demos[4] += 0.10
  sft, = descend(token_mass(mdp, demos), start, [3000], 1.0)
  shares = cut_shares(mdp, demos, wrong, log_ratio(mdp, sft, start))
  spread = 0.15 * 15 / 16  # One of the 16 wrong answers is the common slip as well.
  assert shares["cut"] == pytest.approx(spread, abs=1e-12)
  assert shares["wrong_found"] == pytest.approx(spread / 0.25, abs=1e-12)
  assert shares["right_lost"] == pytest.approx(0, abs=1e-12)


# --- (d) Minorities -------------------------------------------------------------------------------


def _styles(minority, e, answers=9, right=1):
  """Two styles, then the same answers in both: (mdp, start, demos, wrong, style of a response)."""
  mdp = TokenMDP(1, answers, 2, eos=0)
  style_Y, content_Y = mdp.responses.tokens_YxT.T
  share_Y = np.select([style_Y == 1, style_Y == 2], [1 - minority, minority], 0.0)
  content, wrong = right_and_wrong(answers, right, e)
  start = np.zeros((mdp.num_states, answers))
  start[0] = NEVER
  start[0, 1:3] = 0.0
  demos = share_Y * content[content_Y]
  return mdp, start, demos, wrong[content_Y], style_Y


def _population(start, mass):
  """The logits of what the demonstrations do in each state that they visit, else the start."""
  visited = mass.sum(axis=1) > 0
  sft = start.copy()
  with np.errstate(divide="ignore"):
    sft[visited] = np.maximum(np.log(mass[visited] / mass[visited].sum(axis=1)[:, None]), NEVER)
  return sft


@pytest.mark.parametrize("answers, right, e, known", [(9, 1, 0.2, 0.5), (9, 4, 0.3, 0.5),
                                                      (9, 2, 0.1, 0.2)])
def test_a_rare_style_is_kept_where_the_content_gains_more_than_the_style_loses(
    answers, right, e, known
):
  """The reward of style and of content add up; the threshold is m = u R / (W (1 - e))."""
  threshold = known * right / (answers * (1 - e))
  wrong_kept = 1 - (1 - known) * (answers - right) / (answers * e)
  for minority in (0.5 * threshold, 0.98 * threshold, 1.02 * threshold, 2 * threshold):
    mdp, ref, demos, wrong, style = _styles(minority, e, answers, right)
    ref[0, 1:3] = np.log([1 - known, known])
    sft = _population(ref, token_mass(mdp, demos))
    r = log_ratio(mdp, sft, ref)
    rare, common = (style == 2) & ~wrong, (style == 1) & wrong
    tokens = per_token(mdp, baseline_relative(sft, ref))[rare]
    np.testing.assert_allclose(tokens[:, 0], math.log(minority / known), atol=1e-10)
    np.testing.assert_allclose(tokens[:, 1], math.log((1 - e) * answers / right), atol=1e-10)
    np.testing.assert_array_equal(r[rare] < 0, minority < threshold)
    # The other way round, the common style lends its gain to wrong answers.
    np.testing.assert_array_equal(r[common] >= 0, minority <= wrong_kept)


def test_a_style_whose_share_ref_knows_is_not_judged_at_all():
  mdp, ref, demos, wrong, style = _styles(0.01, 0.3)
  ref[0, 1:3] = np.log([0.99, 0.01])
  r = log_ratio(mdp, _population(ref, token_mass(mdp, demos)), ref)
  np.testing.assert_array_equal(r[demos > 0] < 0, wrong[demos > 0])
  assert cut_shares(mdp, demos, wrong, r)["cut"] == pytest.approx(0.3, abs=1e-12)


def test_a_minority_learns_at_its_own_clock():
  """A table learns what follows a style of share m at m times the rate: first cut, then kept."""
  minority, rate, steps = 0.15, 0.5, [0, 1, 4, 20, 100, 1000]
  mdp, start, demos, wrong, style = _styles(minority, 0.2)
  path = descend(token_mass(mdp, demos), start, steps, rate)
  rare = mdp.index[0, (2,)]
  alone = descend(right_and_wrong(9, 1, 0.2)[0][None], np.zeros((1, 9)), steps, rate * minority)
  np.testing.assert_allclose(path[:, rare], alone[:, 0], atol=1e-12)
  right_rare = np.flatnonzero((style == 2) & ~wrong)
  r = log_ratio(mdp, path, path[0])[:, right_rare]
  gains = log_ratio(TokenMDP(1, 9, 1), alone, alone[0])[:, :1]
  losses = per_token(mdp, baseline_relative(path, path[0]))[:, right_rare, 0]
  np.testing.assert_allclose(r, gains + losses, atol=1e-10)
  assert np.all(r[1:4] < 0) and np.all(r[-1] > 0)
  assert math.log(minority / 0.5) + math.log(0.8 * 9) == pytest.approx(r[-1, 0], abs=0.02)
