"""The train step: sums, one division, one update, nothing lost and nothing recompiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax.data.batches import SFTBatch
from dpr_jax.losses import make_sft_loss
from dpr_jax.training import TrainState, make_train_step


def _copy(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


@pytest.mark.parametrize("accumulation", [1, 3, 4, 12])
def test_the_update_is_that_of_the_weighted_mean(rng, loss_fn, make_rows, make_state, accumulation):
  state, rows = make_state(optax.sgd(0.05)), make_rows(rng)
  w, b = (np.asarray(state.trainable["params"][k], np.float64) for k in ("kernel", "bias"))
  step = make_train_step(loss_fn, optax.sgd(0.05), accumulation=accumulation)
  state, metrics = step(state, rows)
  error = rows.x @ w + b - rows.y
  total = rows.weight.sum()
  grad_w = 2 * (rows.weight * error) @ rows.x / total
  grad_b = 2 * (rows.weight * error).sum() / total
  np.testing.assert_allclose(state.trainable["params"]["kernel"], w - 0.05 * grad_w, atol=1e-6)
  np.testing.assert_allclose(state.trainable["params"]["bias"], b - 0.05 * grad_b, atol=1e-6)
  expected = {
      "loss": (rows.weight * error**2).sum() / total,
      "mean_error": (rows.weight * error).sum() / total,
      "tokens": total,
      "grad_norm": np.sqrt((grad_w**2).sum() + grad_b**2),
      "skipped": 0.0,
  }
  for name, value in expected.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
  assert int(state.step) == 1


def test_accumulated_equals_full_batch_for_a_packed_decoder(make_model, rng):
  """Micro-batches of very unequal weight: a mean of means would be far off."""
  model, variables = make_model(int(rng.integers(1 << 30)), num_layers=1)
  tokens = rng.integers(0, 29, (6, 9)).astype(np.int32)
  share = np.array([[0.9], [0.9], [0.2], [0.1], [0.5], [0.0]])
  mask = (rng.random((6, 9)) < share).astype(np.float32)
  mask[:, 0] = 0.0
  batch = SFTBatch(tokens=tokens, segment_ids=np.ones_like(tokens), loss_mask=mask)
  out = []
  for accumulation in (1, 3):
    state = TrainState.create(jax.tree.map(jnp.array, variables), optax.sgd(1.0), jax.random.key(0))
    step = make_train_step(make_sft_loss(model), optax.sgd(1.0), accumulation=accumulation)
    out.append(step(state, batch))
  (a, a_metrics), (b, b_metrics) = out
  # Gradients of order 1 in float32: over hundreds of seeds sums in another order moved them by
  # at most 4e-6; a mean of means moves them by more than 1e-2.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.trainable, b.trainable)
  assert float(a_metrics["loss"]) == pytest.approx(float(b_metrics["loss"]), rel=5e-6)
  assert float(a_metrics["grad_norm"]) == pytest.approx(float(b_metrics["grad_norm"]), rel=5e-6)
  assert float(a_metrics["grad_norm"]) > 0.1


def test_every_step_and_micro_batch_has_its_own_key(rng, loss_fn, make_rows, make_state):
  rows, state = make_rows(rng), make_state(optax.sgd(0.0), seed=5)
  step = make_train_step(loss_fn, optax.sgd(0.0))
  seen = []
  for t in range(3):
    state, metrics = step(state, rows)
    expected = jax.random.uniform(jax.random.fold_in(jax.random.key(5), t))
    assert float(metrics["noise"]) == pytest.approx(float(expected), abs=1e-7)
    seen.append(float(metrics["noise"]))
  assert len(set(seen)) == 3
  _, metrics = make_train_step(loss_fn, optax.sgd(0.0), accumulation=4)(make_state(seed=5), rows)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 4)
  assert float(metrics["noise"]) == pytest.approx(
      sum(float(jax.random.uniform(k)) for k in keys), abs=1e-6
  )


def test_the_state_is_donated_but_never_what_others_share(rng, loss_fn, make_rows, make_state):
  shared = {"other": jnp.ones((4,))}
  old = make_state().replace(frozen=shared)
  state, _ = make_train_step(loss_fn, optax.adam(0.1))(old, make_rows(rng))
  gone = jax.tree.leaves((old.trainable, old.opt_state, old.step))
  assert all(x.is_deleted() for x in gone)
  assert not shared["other"].is_deleted() and state.frozen["other"] is shared["other"]
  assert not old.rng.is_deleted()
  kept = make_state()
  make_train_step(loss_fn, optax.adam(0.1), donate=False)(kept, make_rows(rng))
  assert not any(x.is_deleted() for x in jax.tree.leaves(kept))


def test_frozen_variables_reach_the_loss_and_do_not_move(rng, loss_fn, make_rows, make_state):
  """As with LoRA: what is trained is laid over what is not."""
  rows = make_rows(rng)
  state = make_state()
  full = _copy(state.trainable["params"])

  def split_loss(variables, batch, key):
    return loss_fn({"params": {**variables["params"], **variables["lora"]}}, batch, key)

  optimizer = optax.sgd(0.1)
  lora = {"lora": {"bias": jnp.array(full["bias"])}}
  frozen = {"params": {"kernel": jnp.array(full["kernel"])}}
  split = TrainState.create(lora, optimizer, jax.random.key(0), frozen=frozen)
  split, metrics = make_train_step(split_loss, optimizer)(split, rows)
  whole, expected = make_train_step(loss_fn, optimizer)(make_state(optimizer), rows)
  np.testing.assert_array_equal(split.frozen["params"]["kernel"], full["kernel"])
  np.testing.assert_allclose(
      split.trainable["lora"]["bias"], whole.trainable["params"]["bias"], atol=1e-6
  )
  assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
  assert set(split.variables) == {"params", "lora"}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_state_is_made_as_it_is_described(loss_fn, make_state, describe, ema_decay):
  step = make_train_step(loss_fn, optax.adamw(0.1), ema_decay=ema_decay)
  variables, key, frozen = make_state().trainable, jax.random.key(3), {"other": jnp.ones(4)}
  described = step.abstract(describe(variables), key)
  state = step.init(variables, key, frozen)
  assert state.frozen is frozen and int(state.step) == 0
  assert describe(state.replace(frozen={})) == described == step.abstract(variables, key)
  assert bool(state.ema) == bool(ema_decay)
  jax.tree.map(np.testing.assert_array_equal, state.ema or variables, variables)
  assert optax.tree.norm(optax.tree.get(state.opt_state, "mu")) == 0.0


def test_compiles_once(rng, loss_fn, make_rows, make_state):
  step, state = make_train_step(loss_fn, optax.adam(0.1), accumulation=2), make_state()
  assert step.compilations() == 0
  for _ in range(4):
    state, _ = step(state, jax.tree.map(jnp.asarray, make_rows(rng)))
    assert step.compilations() == 1
  step(state, jax.tree.map(jnp.asarray, make_rows(rng, rows=6)))
  assert step.compilations() == 2  # the counter does count.


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_reported(
    rng, loss_fn, make_rows, make_state, bad
):
  def with_root(variables, batch, key):
    loss_sum, weight, metrics = loss_fn(variables, batch, key)
    # The slope of a root at zero is infinite, its value is not.
    gap = variables["params"]["bias"] - jax.lax.stop_gradient(variables["params"]["bias"])
    return loss_sum + jnp.sqrt(gap) * (batch.y[0] > 100), weight, metrics

  step = make_train_step(with_root if bad == "gradient" else loss_fn, optax.adam(0.1))
  good = make_rows(rng)
  state, metrics = (make_state(), None)
  if bad == "loss":
    state, metrics = step(state, good)
    assert float(metrics["skipped"]) == 0.0
  before = _copy((state.trainable, state.opt_state))
  poison = good.y.copy()
  poison[0] = np.nan if bad == "loss" else 1000.0
  start = int(state.step)
  state, metrics = step(state, good.replace(y=poison, weight=np.ones_like(poison)))
  assert float(metrics["skipped"]) == 1.0
  assert bool(np.isfinite(metrics["loss"])) == (bad == "gradient")
  jax.tree.map(np.testing.assert_array_equal, before, _copy((state.trainable, state.opt_state)))
  assert int(state.step) == start + 1


def test_a_batch_without_weight_gives_zero_and_no_nan(rng, loss_fn, make_rows, make_state):
  rows = make_rows(rng)
  optimizer = optax.adamw(0.1, weight_decay=0.5)
  step = make_train_step(loss_fn, optimizer, accumulation=3)
  state, metrics = step(make_state(optimizer), rows)  # Momentum and decay would act from here on.
  assert float(metrics["empty"]) == 0.0
  before = _copy((state.trainable, state.opt_state))
  state, metrics = step(state, rows.replace(weight=np.zeros_like(rows.weight)))
  assert float(metrics["loss"]) == float(metrics["mean_error"]) == float(metrics["skipped"]) == 0.0
  assert float(metrics["empty"]) == 1.0 and int(state.step) == 2
  jax.tree.map(np.testing.assert_array_equal, before, _copy((state.trainable, state.opt_state)))


def test_a_batch_that_does_not_split_is_refused(rng, loss_fn, make_rows, make_state):
  step = make_train_step(loss_fn, optax.adam(0.1), accumulation=5)
  with pytest.raises(ValueError, match="accumulation=5 does not divide the batch of 12 rows"):
    step(make_state(), make_rows(rng))
