"""SPIN against the formula, at its fixed point, and at log-ratios that overflow exp."""

import jax
import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.losses import generated_rows, make_pair_batch
from dpr_jax.losses.pairs import summed_logp
from dpr_jax.methods.spin import SPIN
from dpr_jax.theory.exact import TabularModel, enumerate_rollout
from dpr_jax.theory.mdp import TokenMDP, sequence_logp


@pytest.fixture
def pairs(bigram, make_rows, rng):
  """(model, policy, pairs under another, frozen model)."""
  model, variables = bigram
  frozen = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), variables)
  return model, variables, make_pair_batch(model, frozen, make_rows(6, 9), make_rows(6, 8))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_equals_the_formula(pairs, beta):
  model, variables, batch = pairs
  loss_sum, weight, metrics = SPIN(beta=beta).loss(model)(
      variables, batch, jax.random.key(0)
  )
  score = lambda rows: np.asarray(summed_logp(model, variables, rows), np.float64)
  margin = (score(batch.demos) - batch.demo_logp) - (
      score(batch.generated) - batch.generated_logp
  )
  assert float(weight) == 6 == float(metrics["pairs"])
  assert float(loss_sum) == pytest.approx(np.sum(np.log1p(np.exp(-beta * margin))), rel=1e-5)
  assert float(metrics["pair_accuracy"][0]) == np.sum(margin > 0)


def test_gradient_by_differences(pairs, check_gradient):
  model, variables, batch = pairs
  loss = lambda v: SPIN(beta=0.7).loss(model)(v, batch, None)[0]
  check_gradient(loss, loss, variables)


def test_the_loss_at_the_frozen_model_is_log_two(bigram, make_rows):
  model, variables = bigram
  batch = make_pair_batch(model, variables, make_rows(6, 9), make_rows(6, 8))
  loss_sum, weight, _ = SPIN().loss(model)(variables, batch, None)
  assert float(loss_sum) / float(weight) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("shift", [-1e5, -1e3, 1e3, 1e5])
def test_extreme_log_ratios_stay_finite(pairs, shift):
  model, variables, batch = pairs
  batch = batch.replace(demo_logp=batch.demo_logp - shift)  # the demo's log-ratio grows by shift.
  loss = lambda v: SPIN().loss(model)(v, batch, None)[0]
  loss, grads = jax.jit(jax.value_and_grad(loss))(variables)
  assert float(loss) == pytest.approx(max(0.0, -0.1 * shift) * 6, rel=1e-2, abs=1e-3)
  size = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
  assert np.isfinite(size) and (size > 1e-3) == (shift < 0)  # a lost pair still pulls.


def test_tokens_outside_of_the_masks_do_not_matter(pairs, rng):
  model, variables, batch = pairs
  loss = jax.jit(lambda b: SPIN().loss(model)(variables, b, None)[0])
  noise = lambda rows: rows.replace(tokens=np.where(
      rows.segment_ids > 0, rows.tokens, rng.integers(0, 7, rows.tokens.shape)
  ).astype(np.int32))
  other = batch.replace(demos=noise(batch.demos), generated=noise(batch.generated))
  assert float(loss(other)) == float(loss(batch))


def test_fillers_have_no_weight(pairs):
  model, variables, batch = pairs
  loss = SPIN().loss(model)
  keep = np.array([True, False, True, True, False, True])
  mask = batch.demos.loss_mask * keep[:, None]
  filled = loss(variables, batch.replace(demos=batch.demos.replace(loss_mask=mask)), None)
  alone = loss(variables, jax.tree.map(lambda x: x[keep], batch), None)
  assert float(filled[0]) == pytest.approx(float(alone[0]), rel=1e-6)
  assert float(filled[1]) == float(alone[1]) == 4


def test_micro_batches_add_up(pairs, check_accumulation):
  model, variables, batch = pairs
  check_accumulation(SPIN().loss(model), variables, batch)


def test_the_gradient_vanishes_where_the_model_is_the_demonstrator(rng):
  """Exactly: all pairs of responses, weighed by both probabilities; and not elsewhere."""
  mdp = TokenMDP(1, 3, 2)
  model, expert, other = TabularModel(mdp), mdp.random_logits(rng), mdp.random_logits(rng)

  def gradient(policy_SxA):
    policy = model.variables(policy_SxA)
    rollout = jax.jit(lambda v: enumerate_rollout(model, v, v, v))(policy)
    rows, n = generated_rows(rollout), len(rollout.lengths)
    take = lambda index: jax.tree.map(lambda x: np.asarray(x)[index], rows)
    left, right = np.repeat(np.arange(n), n), np.tile(np.arange(n), n)
    batch = jax.jit(lambda d, g: make_pair_batch(model, policy, d, g))(take(left), take(right))
    p, q = (np.exp(sequence_logp(mdp, x)) for x in (expert, policy_SxA))

    def loss(v):  # one pair at a time, so that each has its own weight.
      one = lambda b: SPIN(beta=0.5).loss(model)(
          v, jax.tree.map(lambda x: x[None], b), None
      )[0]
      return np.float32(p[left] * q[right]) @ jax.vmap(one)(batch)

    return np.asarray(jax.jit(jax.grad(loss))(policy)["params"]["table"])

  assert np.abs(gradient(expert)).max() < 1e-6
  assert np.abs(gradient(other)).max() > 1e-3


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_an_impossible_beta_is_refused(beta):
  config = default_config()
  config.methods.spin = SPIN(beta=beta)
  with pytest.raises(UserError, match=f"config.methods.spin.beta={beta}"):
    resolve(config)
