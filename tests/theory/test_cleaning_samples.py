"""SFT on its way and on samples: propositions (e) and (f) of docs/cleaning_theory.md."""

import itertools
import math

import jax
import numpy as np
import optax
import pytest
import scipy.stats

from dpr_jax.data.batches import SFTBatch
from dpr_jax.keys import make_key
from dpr_jax.losses import make_sft_loss
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.cleaning import (
    ascent,
    cut_shares,
    descend,
    log_ratio,
    right_and_wrong,
    speed,
    token_mass,
)
from dpr_jax.theory.exact import TabularModel
from dpr_jax.theory.gradients import score_gradients
from dpr_jax.theory.mdp import by_prompt, sequence_logp
from dpr_jax.theory.objectives import sft_loss
from dpr_jax.training import TrainState, make_train_step

NEVER = -40.0  # a logit of what a policy that has learned the form does not say.


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


# --- The descent --------------------------------------------------------------------------------


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


def test_several_runs_at_once_are_the_runs_by_themselves(make_instance, rng, random_demos):
  mdp = make_instance(2, 3, 3).mdp
  demos, start = np.stack([random_demos(mdp) for _ in range(3)]), mdp.random_logits(rng)
  path = descend(token_mass(mdp, demos), start, [0, 2, 5], 0.5)
  assert path.shape == (3, 3, mdp.num_states, mdp.vocab_size)
  for i, d in enumerate(demos):
    alone = descend(token_mass(mdp, d), start, [0, 2, 5], 0.5)
    np.testing.assert_allclose(path[:, i], alone, atol=1e-13)
    np.testing.assert_allclose(
        log_ratio(mdp, path, path[0])[:, i], log_ratio(mdp, alone, alone[0]), atol=1e-12
    )


def test_the_loss_does_not_rise_up_to_the_rate_that_the_docstring_names(
    make_instance, rng, random_demos
):
  mdp = make_instance(1, 3, 3).mdp
  demos = np.eye(len(mdp.responses.lengths_Y))[3]  # The steepest: all in one response.
  for d in (demos, random_demos(mdp)):
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
  p, wrong = right_and_wrong(answers, right, 0.2)
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
  rng, samples, details, e = np.random.default_rng(0), 200, 24, 0.2
  mdp, start, p, wrong = _varied(details, e)
  steps, sizes = [0, 4, 10, 20, 400], [8, 32, 128, 512]
  path = descend(token_mass(mdp, p), start, steps, 1.0)
  shares = cut_shares(mdp, p, wrong, log_ratio(mdp, path[1:], path[0]))
  np.testing.assert_allclose(shares["right_lost"], 0.0, atol=1e-12)
  np.testing.assert_allclose(shares["wrong_found"], 1.0)
  lost, error = np.zeros((2, len(sizes), len(steps) - 1))
  for row, n in enumerate(sizes):
    demos = rng.multinomial(n, p, size=samples) / n
    path = descend(token_mass(mdp, demos), start, steps, 1.0)
    lost_KxN = cut_shares(mdp, p, wrong, log_ratio(mdp, path[1:], path[0]))["right_lost"]
    lost[row], error[row] = lost_KxN.mean(axis=1), lost_KxN.std(axis=1, ddof=1) / samples**0.5
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


def test_a_demonstration_that_sft_trained_on_is_judged_too_kindly(rng, random_demos):
  """E[r_in] - E[r_out] = sum_y Cov(p^(y), r(y)) > 0, by enumeration of all samples.

  After one small step: rate tr(K Sigma) / n.
  """
  mdp = TokenMDP(1, 3, 2, eos=0)
  p, start = random_demos(mdp), mdp.random_logits(rng, 0.5)
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
  content, is_wrong = right_and_wrong(answers, right, e)
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


def test_the_reward_is_what_all_steps_between_ref_and_sft_have_done(make_instance, random_demos):
  """r(y) is the integral of the speed over the gradient flow from ref to sft."""
  i = make_instance(2, 3, 3)
  mass, rate, steps = token_mass(i.mdp, random_demos(i.mdp)), 0.01, 300
  path = descend(mass, i.ref, range(steps + 1), rate)
  speeds = np.array([speed(i.mdp, x, mass) for x in path])
  integral = rate * np.sum((speeds[1:] + speeds[:-1]) / 2, axis=0)  # The trapezoidal rule.
  r = log_ratio(i.mdp, path[-1], path[0])
  np.testing.assert_allclose(r, integral, atol=0.02 * np.abs(r).max())
  assert np.abs(r).max() > 0.1
