"""Schedules by their formula at every update, and AdamW by loops in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax.config import OptimizerConfig
from dpr_jax.training.optimizer import clip_by_global_norm, make_optimizer, make_schedule

CONFIG = OptimizerConfig(
    learning_rate=0.02, schedule="constant", final_fraction=0.25, warmup_steps=0, weight_decay=0.0,
    b1=0.8, b2=0.9, eps=1e-6, max_grad_norm=0.0,
)


def _expected(kind, t, steps, warmup):
  if t < warmup:
    return 0.02 * (t + 1) / warmup
  done = min((t - warmup) / max(steps - warmup - 1, 1), 1.0)
  if kind == "constant":
    return 0.02
  if kind == "linear":
    return 0.02 * (1 - 0.75 * done)
  return 0.02 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * done)))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(
    "steps,warmup", [(10, 0), (10, 1), (10, 4), (3, 2), (2, 2), (1, 0), (5, 20)]
)
def test_schedule_equals_its_formula(kind, steps, warmup):
  schedule = make_schedule(dataclasses.replace(CONFIG, schedule=kind, warmup_steps=warmup), steps)
  warmup = min(warmup, steps)
  for t in range(steps):
    assert float(schedule(t)) == pytest.approx(_expected(kind, t, steps, warmup), rel=1e-5)
  if kind != "constant" and steps - warmup >= 2:
    assert float(schedule(steps - 1)) == pytest.approx(0.02 * 0.25, rel=1e-5)


def _params(rng):
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {"group_0": {"kernel": draw(2, 3), "bias": draw(2, 3)}, "norm": {"scale": draw(3)}}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_updates_equal_adamw_in_loops(rng, max_grad_norm):
  config = dataclasses.replace(
      CONFIG, weight_decay=0.3, max_grad_norm=max_grad_norm, schedule="linear", warmup_steps=2
  )
  steps, params = 5, _params(rng)
  optimizer = make_optimizer(config, steps)
  opt_state = optimizer.init(params)
  ours = params
  naive = {"/".join(k.key for k in path): np.asarray(x, np.float64)
           for path, x in jax.tree_util.tree_leaves_with_path(params)}
  moments = {k: [np.zeros_like(x), np.zeros_like(x)] for k, x in naive.items()}
  for t in range(steps):
    grads = _params(rng)
    updates, opt_state = jax.jit(optimizer.update)(grads, opt_state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    flat = {"/".join(k.key for k in path): np.asarray(x, np.float64)
            for path, x in jax.tree_util.tree_leaves_with_path(grads)}
    norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
    clip = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
    assert clip < 1.0 or not max_grad_norm
    for name, g in flat.items():
      m, v = moments[name]
      m[...] = 0.8 * m + 0.2 * clip * g
      v[...] = 0.9 * v + 0.1 * (clip * g) ** 2
      direction = (m / (1 - 0.8 ** (t + 1))) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-6)
      decay = 0.3 * naive[name] if name.endswith("kernel") else 0.0
      naive[name] = naive[name] - _expected("linear", t, steps, 2) * (direction + decay)
  for path, x in jax.tree_util.tree_leaves_with_path(ours):
    np.testing.assert_allclose(x, naive["/".join(k.key for k in path)], atol=1e-5)


def test_norms_and_biases_of_the_decoder_do_not_decay(make_model):
  _, variables = make_model(0, qkv_bias=True, qk_norm=True, tied_head=False)
  optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=1.0), 10)
  zeros = jax.tree.map(jnp.zeros_like, variables)
  updates, _ = jax.jit(lambda z, v: optimizer.update(z, optimizer.init(v), v))(zeros, variables)
  moved = {
      jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[1]: bool(np.any(u))
      for path, u in jax.tree_util.tree_leaves_with_path(updates)
  }
  assert moved == {"kernel": True, "table": True, "scale": False, "bias": False}


@pytest.mark.parametrize("share", [0.3, 1.0, 2.5])
def test_clipping_equals_that_of_optax(rng, share):
  grads = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
           "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}
  max_norm = float(share * optax.tree.norm(grads))
  got, _ = clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
  want, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
  np.testing.assert_allclose(got["a"], want["a"], rtol=1e-6)
  # In bfloat16 against the exact product: the factor and the product are rounded. (optax rounds
  # four times: the norm, the quotient, max_norm and the product.)
  factor = min(1.0, max_norm / float(optax.tree.norm(grads)))
  np.testing.assert_allclose(
      np.asarray(got["b"], np.float64), np.asarray(grads["b"], np.float64) * factor,
      rtol=(1 + 2.0**-8) ** 2 - 1,
  )
  assert got["b"].dtype == jnp.bfloat16


def test_clipping_leaves_gradients_of_zero():
  zero = {"a": jnp.zeros(3)}
  got, _ = clip_by_global_norm(1.0).update(zero, optax.EmptyState())
  np.testing.assert_array_equal(got["a"], 0.0)


def test_clipping_keeps_no_second_copy_of_the_gradients(rng):
  """In a branch, as in a train step, where its input cannot be overwritten."""
  grads = {k: jnp.asarray(rng.normal(size=(64, 512)), jnp.float32) for k in "abcd"}

  def temporaries(clip):
    optimizer = optax.chain(clip, optax.adam(1e-3))

    def step(grads, params, state):
      def apply(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

      return jax.lax.cond(grads["a"][0, 0] < 9, apply, lambda *old: old, params, state)

    args = (grads, grads, optimizer.init(grads))
    program = jax.jit(step, donate_argnums=(1, 2)).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes

  a_copy = sum(x.nbytes for x in grads.values())
  assert temporaries(clip_by_global_norm(1.0)) < a_copy / 2
  assert temporaries(optax.clip_by_global_norm(1.0)) > a_copy / 2
