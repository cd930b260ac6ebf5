"""GSIL: each kind against its formula, its optimum as a density ratio, and bounded exponents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.losses import make_pair_batch
from dpr_jax.losses.pairs import summed_logp
from dpr_jax.methods.gsil import DIVERGENCES, GSIL, bounded_exp, gsil_terms

logistic = lambda x: 1 / (1 + np.exp(-x))
FORMULAS = {
    "bernoulli": lambda u, v: -np.log(logistic(u)) - np.log(logistic(-v)),
    "brier": lambda u, v: (1 - logistic(u)) ** 2 / 2 + logistic(v) ** 2 / 2,
    "hinge": lambda u, v: np.maximum(0, 1 - u) + np.maximum(0, 1 + v),
    "kliep": lambda u, v: -u + np.exp(v) - 1,
    "lsif": lambda u, v: -np.exp(u) + np.exp(2 * v) / 2,
}


@pytest.fixture
def pairs(bigram, make_rows, rng):
  """(model, policy, pairs under another, frozen model)."""
  model, variables = bigram
  frozen = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), variables)
  return model, variables, make_pair_batch(model, frozen, make_rows(6, 9), make_rows(6, 8))


def test_every_kind_is_known():
  assert set(FORMULAS) == set(DIVERGENCES)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("alpha, offset", [(0.1, 0.0), (0.5, 0.3)])
def test_loss_equals_the_formula(pairs, kind, alpha, offset):
  model, variables, batch = pairs
  loss_sum, weight, metrics = GSIL(divergence=kind, alpha=alpha, offset=offset).loss(model)(
      variables, batch, jax.random.key(0)
  )
  score = lambda rows: np.asarray(summed_logp(model, variables, rows), np.float64)
  u = alpha * (score(batch.demos) - np.asarray(batch.demo_logp)) + offset
  v = alpha * (score(batch.generated) - np.asarray(batch.generated_logp)) + offset
  assert max(np.abs(u).max(), np.abs(v).max()) < 5.0
  expected = float(np.sum(FORMULAS[kind](u, v)))
  assert float(weight) == 6 == float(metrics["pairs"])
  assert float(loss_sum) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradient_by_differences(pairs, check_gradient, kind):
  model, variables, batch = pairs
  loss = lambda v: GSIL(divergence=kind, alpha=0.3).loss(model)(v, batch, None)[0]
  check_gradient(loss, loss, variables)


@pytest.mark.parametrize("kind", ["bernoulli", "brier", "kliep", "lsif"])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 5.0])
def test_the_minimum_is_the_log_density_ratio(kind, ratio):
  """min_x p l_demo(x) + q l_generated(x) lies at x = log(p / q)."""
  grid = np.linspace(-3, 3, 6001).astype(np.float32)
  with jax.enable_x64(True):
    demo, generated = gsil_terms(kind, *[jnp.asarray(grid, jnp.float64)] * 2, 5.0)
    best = grid[int(np.argmin(ratio * np.asarray(demo) + np.asarray(generated)))]
  assert best == pytest.approx(np.log(ratio), abs=2e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_losses_fall_with_the_demo_and_rise_with_the_sample(kind):
  x = jnp.linspace(-8.0, 8.0, 401)
  slope = lambda which: jax.vmap(jax.grad(lambda y: gsil_terms(kind, y, y, 5.0)[which]))(x)
  assert np.all(slope(0) <= 0) and np.all(slope(1) >= 0)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e5, -1e3, 1e3, 1e5])
def test_extreme_log_ratios_stay_finite(pairs, kind, shift):
  model, variables, batch = pairs
  batch = batch.replace(
      demo_logp=batch.demo_logp + shift, generated_logp=batch.generated_logp - shift
  )  # at shift > 0 the demo's ratio is far too small and the sample's far too large.
  loss = lambda v: GSIL(divergence=kind).loss(model)(v, batch, None)[0]
  value, grads = jax.jit(jax.value_and_grad(loss))(variables)
  size = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
  assert np.isfinite(value) and np.isfinite(size)
  if kind != "brier" and shift > 0:  # brier saturates, as a squared error does.
    assert size > 1e-3


def test_exp_goes_on_as_its_tangent():
  x = np.array([-50.0, 0.0, 2.9, 3.0, 4.0, 1e6], np.float32)
  got = bounded_exp(jnp.asarray(x), 3.0)
  np.testing.assert_allclose(got[:4], np.exp(x[:4]), rtol=1e-6)
  np.testing.assert_allclose(got[4:], np.exp(3.0) * (1 + x[4:] - 3.0), rtol=1e-6)
  slope = jax.vmap(jax.grad(lambda y: bounded_exp(y, 3.0)))(jnp.asarray([2.0, 3.5, 1e6]))
  np.testing.assert_allclose(slope, np.exp([2.0, 3.0, 3.0]), rtol=1e-6)


def test_tokens_outside_of_the_masks_do_not_matter(pairs, rng):
  model, variables, batch = pairs
  loss = jax.jit(lambda b: GSIL().loss(model)(variables, b, None)[0])
  noise = lambda rows: rows.replace(tokens=np.where(
      rows.segment_ids > 0, rows.tokens, rng.integers(0, 7, rows.tokens.shape)
  ).astype(np.int32))
  other = batch.replace(demos=noise(batch.demos), generated=noise(batch.generated))
  assert float(loss(other)) == float(loss(batch))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_fillers_have_no_weight(pairs, kind):
  model, variables, batch = pairs
  loss = GSIL(divergence=kind).loss(model)
  keep = np.array([True, False, True, True, False, True])
  mask = batch.generated.loss_mask * keep[:, None]
  filled = loss(variables, batch.replace(generated=batch.generated.replace(loss_mask=mask)), None)
  alone = loss(variables, jax.tree.map(lambda x: x[keep], batch), None)
  assert float(filled[0]) == pytest.approx(float(alone[0]), rel=1e-5, abs=1e-6)
  assert float(filled[1]) == float(alone[1]) == 4


@pytest.mark.parametrize("kind", ["bernoulli", "lsif"])
def test_micro_batches_add_up(pairs, check_accumulation, kind):
  model, variables, batch = pairs
  check_accumulation(GSIL(divergence=kind).loss(model), variables, batch)


def test_what_is_not_a_setting_is_refused():
  for method, match in (
      (GSIL(divergence="ulsif"), "divergence='ulsif'.*kliep"), (GSIL(alpha=0.0), "alpha=0.0"),
  ):
    config = default_config()
    config.methods.gsil = method
    with pytest.raises(UserError, match=f"config.methods.gsil.{match}"):
      resolve(config)
  with pytest.raises(ValueError, match="divergence='x'"):
    gsil_terms("x", jnp.zeros(1), jnp.zeros(1), 5.0)
