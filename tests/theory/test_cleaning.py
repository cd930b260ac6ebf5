"""What the sign of a cross-fitted reward says: the propositions of docs/cleaning_theory.md."""

import itertools
import math

import jax
import numpy as np
import optax
import pytest
import scipy.stats

from dpr_jax.data.batches import SFTBatch
from dpr_jax.evaluation.cleaning import summarize
from dpr_jax.keys import make_key
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.cleaned_sft import CleanedSFT
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.cleaning import ascent, cut_shares, descend, log_ratio, speed, token_mass
from dpr_jax.theory.exact import TabularModel
from dpr_jax.theory.gradients import score_gradients
from dpr_jax.theory.mdp import by_prompt, per_token, sequence_logp
from dpr_jax.theory.objectives import baseline_relative, sft_loss
from dpr_jax.theory.optimum import as_policy
from dpr_jax.theory.values import sequence_kl
from dpr_jax.training import TrainState, make_train_step

NEVER = -40.0  # a logit of what a policy that has learned the form does not say.


def _normalised(mdp, weights_Y):
  return weights_Y / by_prompt(mdp, weights_Y)[mdp.responses.prompts_Y]


def _demos(mdp, rng):
  """A random distribution over each prompt's responses."""
  return _normalised(mdp, rng.exponential(size=len(mdp.responses.lengths_Y)))


def _batch(mdp, rows):
  """The package's batch of responses, by their row; a prompt is one token."""
  y = mdp.responses
  tokens = np.concatenate([mdp.vocab_size + y.prompts_Y[:, None], y.tokens_YxT], axis=1)[rows]
  mask = np.concatenate([np.zeros((len(rows), 1)), y.mask_YxT[rows]], axis=1).astype(np.float32)
  segments = np.maximum(mask, np.eye(1, mask.shape[1])).astype(np.int32)
  return SFTBatch(tokens=tokens.astype(np.int32), loss_mask=mask, segment_ids=segments)


def _sampled(mdp, rows):
  """Demonstrations `rows` as weights of responses: their shares, times the number of prompts."""
  return np.bincount(rows, minlength=len(mdp.responses.lengths_Y)) * mdp.num_prompts / len(rows)


def _groups(answers, right, wrong_share):
  """One state, `right` of the answers right: their probabilities, and which are wrong."""
  wrong = np.arange(answers) >= right
  return np.where(wrong, wrong_share / (answers - right), (1 - wrong_share) / right), wrong


# --- The code -----------------------------------------------------------------------------------


def test_the_descent_is_the_packages_sft(make_instance, rng):
  mdp = make_instance(2, 3, 3).mdp
  start, rows = mdp.random_logits(rng), rng.integers(0, len(mdp.responses.lengths_Y), 7)
  mass = token_mass(mdp, _sampled(mdp, rows))
  model, rate = TabularModel(mdp), 0.7
  # The package's loss is a mean over tokens.
  optimizer = optax.sgd(rate * mdp.responses.lengths_Y[rows].mean())
  state = TrainState.create(model.variables(start), optimizer, make_key(0))
  step = make_train_step(make_sft_loss(model), optimizer)
  for _ in range(5):
    state, _ = step(state, _batch(mdp, rows))
  got, = descend(mass, start, [5], rate)
  assert np.abs(got - start).max() > 0.1
  np.testing.assert_allclose(state.trainable["params"]["table"], got, atol=1e-5)


def test_several_runs_at_once_are_the_runs_by_themselves(make_instance, rng):
  mdp = make_instance(2, 3, 3).mdp
  demos, start = np.stack([_demos(mdp, rng) for _ in range(3)]), mdp.random_logits(rng)
  path = descend(token_mass(mdp, demos), start, [0, 2, 5], 0.5)
  assert path.shape == (3, 3, mdp.num_states, mdp.vocab_size)
  for i, d in enumerate(demos):
    alone = descend(token_mass(mdp, d), start, [0, 2, 5], 0.5)
    np.testing.assert_allclose(path[:, i], alone, atol=1e-13)
    np.testing.assert_allclose(
        log_ratio(mdp, path, path[0])[:, i], log_ratio(mdp, alone, alone[0]), atol=1e-12
    )


def test_the_shares_are_those_of_the_method_and_its_report(make_instance, rng):
  mdp = make_instance(1, 3, 3).mdp
  counts = rng.multinomial(60, _demos(mdp, rng))
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
  kept = CleanedSFT()._choose(lines, None, None)
  expected = summarize([[line | {"kept": bool(k)} for line, k in zip(lines, kept)]])
  for name in ("cut", "wrong_cut", "wrong_kept"):
    if name in expected:
      assert got[name] == pytest.approx(expected[name]["mean"], abs=1e-12), name
  e = np.sum(counts * wrong) / counts.sum()
  assert got["cut"] == pytest.approx(e * got["wrong_found"] + (1 - e) * got["right_lost"])


def test_the_loss_does_not_rise_up_to_the_rate_that_the_docstring_names(make_instance, rng):
  mdp = make_instance(1, 3, 3).mdp
  demos = np.eye(len(mdp.responses.lengths_Y))[3]  # The steepest: all in one response.
  for d in (demos, _demos(mdp, rng)):
    path = descend(token_mass(mdp, d), mdp.random_logits(rng), range(30), 4.0)
    losses = [sft_loss(mdp, x, d) for x in path]
    assert np.all(np.diff(losses) < 1e-12) and losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("checkpoints, rate, said", [
    ([2, 1], 0.1, "checkpoints"), ([], 0.1, "checkpoints"), ([-1], 0.1, "checkpoints"),
    ([1], 0.0, "learning_rate"),
])
def test_impossible_descents_are_refused(checkpoints, rate, said):
  with pytest.raises(ValueError, match=said):
    descend(np.full((1, 2), 0.5), np.zeros((1, 2)), checkpoints, rate)


# --- (a) The mean ---------------------------------------------------------------------------------


def test_the_mean_reward_is_the_fall_of_the_held_out_loss(make_instance, rng):
  i = make_instance(3, 3, 4)
  demos = _demos(i.mdp, rng)
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
  few, wrong_few = _groups(4, 3, e)
  many, wrong_many = _groups(12, 8, e)
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


# --- (b) The population optimum -------------------------------------------------------------------


def test_sft_run_to_its_optimum_cuts_what_is_less_likely_in_the_demos_than_under_ref(
    make_instance, rng
):
  i = make_instance(2, 3, 2)
  demos = _demos(i.mdp, rng) + 0.02
  demos = _normalised(i.mdp, demos)
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
    demos, wrong = _groups(answers, right, e)
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
  demos, wrong = _groups(20, 4, 0.15)
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
  content, wrong = _groups(answers, right, e)
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


def test_a_style_whose_share_ref_knows_is_not_judged_at_all(rng):
  mdp, ref, demos, wrong, style = _styles(0.01, 0.3)
  ref[0, 1:3] = np.log([0.99, 0.01])
  r = log_ratio(mdp, _population(ref, token_mass(mdp, demos)), ref)
  np.testing.assert_array_equal(r[demos > 0] < 0, wrong[demos > 0])
  assert cut_shares(mdp, demos, wrong, r)["cut"] == pytest.approx(0.3, abs=1e-12)


def test_a_minority_learns_at_its_own_clock(rng):
  """A table learns what follows a style of share m at m times the rate: first cut, then kept."""
  minority, rate, steps = 0.15, 0.5, [0, 1, 4, 20, 100, 1000]
  mdp, start, demos, wrong, style = _styles(minority, 0.2)
  path = descend(token_mass(mdp, demos), start, steps, rate)
  rare = mdp.index[0, (2,)]
  alone = descend(_groups(9, 1, 0.2)[0][None], np.zeros((1, 9)), steps, rate * minority)
  np.testing.assert_allclose(path[:, rare], alone[:, 0], atol=1e-12)
  right_rare = np.flatnonzero((style == 2) & ~wrong)
  r = log_ratio(mdp, path, path[0])[:, right_rare]
  gains = log_ratio(TokenMDP(1, 9, 1), alone, alone[0])[:, :1]
  losses = per_token(mdp, baseline_relative(path, path[0]))[:, right_rare, 0]
  np.testing.assert_allclose(r, gains + losses, atol=1e-10)
  assert np.all(r[1:4] < 0) and np.all(r[-1] > 0)
  assert math.log(minority / 0.5) + math.log(0.8 * 9) == pytest.approx(r[-1, 0], abs=0.02)


# --- (e) Finite samples ---------------------------------------------------------------------------


def _all_samples(n, p_Y):
  """Every sample of n as counts [N, Y], and its probability [N]."""
  rows = [
      np.bincount(rows, minlength=len(p_Y))
      for rows in itertools.combinations_with_replacement(range(len(p_Y)), n)
  ]
  return np.array(rows), scipy.stats.multinomial.pmf(rows, n, p_Y)


def test_run_to_its_end_sft_cuts_what_its_sample_has_too_rarely():
  """P(Binomial(n, p(y)) < n ref(y)), by enumeration of all samples; below n = W (1 - p(y))^n."""
  answers, right = 6, 3
  mdp, start = TokenMDP(1, answers, 1), np.zeros((1, answers))
  p, wrong = _groups(answers, right, 0.2)
  lost = []
  for n in (1, 2, 3, 4, 5, 7, 8):
    counts, weights = _all_samples(n, p)
    assert weights.sum() == pytest.approx(1)
    sft, = descend(token_mass(mdp, counts / n), start, [400], 1.0)
    r = log_ratio(mdp, sft, start)
    got_Y = weights @ (r < 0)
    expected_Y = scipy.stats.binom.cdf(math.ceil(n / answers) - 1, n, p)
    np.testing.assert_allclose(got_Y, expected_Y, atol=1e-12)
    if n < answers:
      np.testing.assert_allclose(got_Y, (1 - p) ** n, atol=1e-12)
      lost.append(weights @ cut_shares(mdp, p, wrong, r)["right_lost"])
  assert np.all(np.diff(lost) < 0)


def _varied(details, e):
  """Two ways to begin, the first right; then any of `details`: (mdp, start, p, wrong)."""
  mdp = TokenMDP(1, details, 2, eos=0)
  way_Y = mdp.responses.tokens_YxT[:, 0]
  start = np.zeros((mdp.num_states, details))
  start[0] = NEVER
  start[0, 1:3] = 0.0
  p_Y = np.select([way_Y == 1, way_Y == 2], [1 - e, e], 0.0) / details
  return mdp, start, p_Y, way_Y == 2


def test_varied_right_answers_are_lost_to_small_samples_and_to_long_sft():
  """Whoever is judged by the population loses none; see the table in the docs for the figures."""
  rng, draws, details, e = np.random.default_rng(0), 200, 24, 0.2
  mdp, start, p, wrong = _varied(details, e)
  steps, sizes = [0, 4, 10, 20, 400], [8, 32, 128, 512]
  path = descend(token_mass(mdp, p), start, steps, 1.0)
  shares = cut_shares(mdp, p, wrong, log_ratio(mdp, path[1:], path[0]))
  np.testing.assert_allclose(shares["right_lost"], 0.0, atol=1e-12)
  np.testing.assert_allclose(shares["wrong_found"], 1.0)
  lost, error = np.zeros((2, len(sizes), len(steps) - 1))
  for row, n in enumerate(sizes):
    demos = rng.multinomial(n, p, size=draws) / n
    path = descend(token_mass(mdp, demos), start, steps, 1.0)
    lost_KxN = cut_shares(mdp, p, wrong, log_ratio(mdp, path[1:], path[0]))["right_lost"]
    lost[row], error[row] = lost_KxN.mean(axis=1), lost_KxN.std(axis=1, ddof=1) / draws**0.5
    # In the end as if there were no tree: a table of responses that has its sample by heart.
    expected = scipy.stats.binom.cdf(
        math.ceil(n / (2 * details)) - 1, n, (1 - e) / details
    )
    assert abs(lost[row, -1] - expected) < 4 * error[row, -1] + 1e-3, n
    # And no more often than Chernoff's bound has it.
    rare, often = 1 / (2 * details), (1 - e) / details
    kl = rare * np.log(rare / often) + (1 - rare) * np.log((1 - rare) / (1 - often))
    assert lost[row, -1] <= math.exp(-n * kl) + 4 * error[row, -1]
  print(f"right answers lost, by size and steps:\n{lost.round(3)}\n+- {error.round(3)}")
  clear = lambda a, b, x, y: (a - b) >= -4 * np.hypot(x, y)
  assert np.all(clear(lost[:-1], lost[1:], error[:-1], error[1:]))  # Falls with n ...
  assert np.all(lost[:-1, -1] - lost[1:, -1] > 4 * np.hypot(error[:-1, -1], error[1:, -1]))
  assert np.all(np.diff(lost, axis=1) > -1e-12)  # ... and grows with SFT.
  assert np.all(lost[:, -1] - lost[:, 0] > 4 * np.hypot(error[:, -1], error[:, 0]))


def test_a_ref_that_has_learned_the_content_leaves_noise_to_the_sign():
  """The same fraction of a longer SFT: right and wrong ones are cut alike, however many demos."""
  rng, n = np.random.default_rng(1), 1024
  mdp, start, p, wrong = _varied(24, 0.2)
  demos = rng.multinomial(n, p, size=100) / n
  path = descend(token_mass(mdp, demos), start, [4, 40, 400], 1.0)
  early, late = (cut_shares(mdp, p, wrong, log_ratio(mdp, path[k + 1], path[k])) for k in (0, 1))
  gap = lambda x: float(np.mean(x["wrong_found"] - x["right_lost"]))
  print(f"cut among wrong minus among right: ref at step 4 {gap(early):.3f}, at 40 {gap(late):.3f}")
  assert gap(early) > 0.5 and gap(late) < 0.15
  assert late["right_lost"].mean() > 0.4


def test_a_demonstration_that_sft_trained_on_is_judged_too_kindly(rng):
  """E[r_in] - E[r_out] = sum_y Cov(p^(y), r(y)) > 0, by enumeration of all samples.

  After one small step: rate tr(K Sigma) / n.
  """
  mdp = TokenMDP(1, 3, 2, eos=0)
  p, start = _demos(mdp, rng), mdp.random_logits(rng, 0.5)
  optimism = {}
  for n in (2, 4):
    counts, weights = _all_samples(n, p)
    sampled = counts / n
    path = descend(token_mass(mdp, sampled), start, [0, 1, 4, 16, 64], 1.0)
    for ref in (0, 1):
      r = log_ratio(mdp, path[2:], path[ref])  # [K, N, Y]
      inside = np.sum(sampled * r, axis=-1) @ weights
      outside = np.sum(p * r, axis=-1) @ weights
      by_loops = [
          sum(
              float(np.cov(sampled[:, y], r[k, :, y], aweights=weights, ddof=0)[0, 1])
              for y in range(len(p))
          )
          for k in range(len(r))
      ]
      np.testing.assert_allclose(inside - outside, by_loops, atol=1e-10)
      assert np.all(inside - outside > 0)
      assert np.all(np.diff(inside - outside) > 0)  # The longer, the more.
      optimism[n, ref] = inside - outside
  for ref in (0, 1):
    assert np.all(optimism[4, ref] < optimism[2, ref])
  # One small step. K: inner products of gradients; Sigma: covariance of one demonstration.
  gradients = score_gradients(mdp, start, np.ones((len(p), 2))).reshape(len(p), -1)
  first = np.trace(gradients @ gradients.T @ (np.diag(p) - np.outer(p, p)))
  assert first > 0
  for n in (2, 4):
    counts, weights = _all_samples(n, p)
    r = log_ratio(mdp, descend(token_mass(mdp, counts / n), start, [1], 1e-5)[0], start)
    gap = weights @ np.sum((counts / n - p) * r, axis=-1)
    assert gap / 1e-5 == pytest.approx(first / n, rel=1e-3)


# --- (f) Where ref stands -------------------------------------------------------------------------


def test_the_form_that_ref_has_not_learned_is_a_bonus_to_right_and_wrong():
  """A form token that all prompts share, then the content: cut iff p(y) < rho ref(y | form)."""
  prompts, answers, right, e = 3, 6, 2, 0.3
  mdp = TokenMDP(prompts, answers, 2, eos=0)
  y = mdp.responses
  content, is_wrong = _groups(answers, right, e)
  content[right:] = e * np.arange(1, 5) / 10  # Some wrong answers are more frequent than others.
  turn = (y.tokens_YxT[:, 1] + y.prompts_Y) % answers  # Each prompt has its own right answers.
  form, wrong = y.tokens_YxT[:, 0] == 3, is_wrong[turn]
  demos = form * content[turn]
  # A step in the first state of one prompt moves those of all.
  kernel = np.eye(mdp.num_states)
  kernel[:prompts, :prompts] = 1.0
  start, steps = np.zeros((mdp.num_states, answers)), [0, 2, 4, 6, 8, 10, 12, 15, 20, 40, 4000]
  mass = token_mass(mdp, demos)
  path, cut = descend(mass, start, steps, 0.3, kernel), []
  population = np.where(form, np.log(np.where(form, demos, 1.0)), 0.0)
  for ref in path[:-1]:
    ref_Y = np.exp(sequence_logp(mdp, ref))
    rho = by_prompt(mdp, ref_Y * form)[y.prompts_Y]
    r = population - np.log(ref_Y)
    bonus = r - (population - np.log(ref_Y / rho))
    np.testing.assert_allclose(bonus[form], -np.log(rho[form]), atol=1e-12)
    np.testing.assert_array_equal(r[form] < 0, (demos < rho * (ref_Y / rho))[form])
    shares = cut_shares(mdp, demos, wrong, log_ratio(mdp, path[-1], ref))
    expected = cut_shares(mdp, demos, wrong, np.where(form, r, 0.0))
    assert shares["cut"] == pytest.approx(expected["cut"], abs=1e-12)
    assert shares["right_lost"] == pytest.approx(0, abs=1e-12)
    cut.append(float(shares["cut"]))
  print(f"share below zero, by the step of ref: {dict(zip(steps, cut))}")
  assert cut[0] == 0 and cut[-1] == pytest.approx(e, abs=1e-12)
  assert np.all(np.diff(cut) >= -1e-12)
  assert len(set(np.round(cut, 9))) > 3  # Not all at once.


@pytest.mark.parametrize("shared", [False, True])
def test_near_sft_the_sign_is_that_of_the_last_step_of_the_others(make_instance, rng, shared):
  """The inner product of d log pi(y) with the mean gradient of the demos, the package's own."""
  mdp = make_instance(2, 3, 3).mdp
  kernel = None
  if shared:
    features = rng.normal(size=(mdp.num_states, 4))
    kernel = features @ features.T
  rows = rng.integers(0, len(mdp.responses.lengths_Y), 6)
  mass = token_mass(mdp, _sampled(mdp, rows))
  rate = 1e-6
  ref, = descend(mass, mdp.random_logits(rng), [3], 0.05, kernel)
  sft, = descend(mass, ref, [1], rate, kernel)
  r = log_ratio(mdp, sft, ref)
  got = speed(mdp, ref, mass, kernel)

  model, batch = TabularModel(mdp), _batch(mdp, rows)
  loss = lambda variables: make_sft_loss(model)(variables, batch, None)[0] / len(rows)
  mean = -np.asarray(jax.jit(jax.grad(loss))(model.variables(ref))["params"]["table"])
  np.testing.assert_allclose(mean, ascent(mass, ref), atol=1e-6)
  gradients = score_gradients(mdp, ref, np.ones(mdp.responses.tokens_YxT.shape))
  pushed = ascent(mass, ref) if kernel is None else kernel @ ascent(mass, ref)
  np.testing.assert_allclose(got, np.tensordot(gradients, pushed, axes=2), atol=1e-10)

  scale = np.abs(got).max()
  np.testing.assert_allclose(r / rate, got, atol=1e-3 * scale)
  sure = np.abs(got) > 2e-3 * scale
  np.testing.assert_array_equal(np.sign(r[sure]), np.sign(got[sure]))
  assert {-1.0, 1.0} <= set(np.sign(got[sure]))
  # Of what SFT trains on the mean is a squared norm: it rises, whatever becomes of the others.
  inside = np.mean(got[rows])
  assert inside == pytest.approx(np.sum(ascent(mass, ref) * pushed), abs=1e-10)
  assert inside > 0


def test_the_reward_is_what_all_steps_between_ref_and_sft_have_done(make_instance, rng):
  """r(y) is the integral of the speed over the gradient flow from ref to sft."""
  i = make_instance(2, 3, 3)
  mass, rate, steps = token_mass(i.mdp, _demos(i.mdp, rng)), 0.01, 300
  path = descend(mass, i.ref, range(steps + 1), rate)
  speeds = np.array([speed(i.mdp, x, mass) for x in path])
  integral = rate * np.sum((speeds[1:] + speeds[:-1]) / 2, axis=0)  # The trapezoidal rule.
  r = log_ratio(i.mdp, path[-1], path[0])
  np.testing.assert_allclose(r, integral, atol=0.02 * np.abs(r).max())
  assert np.abs(r).max() > 0.1
