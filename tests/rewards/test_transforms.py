"""Transforms against loops; what stands in the padding never comes out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.rewards import Endogenous, LogLikelihood, returns, transforms
from dpr_jax.rewards.transforms import RewardContext, needs, parse

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _case(rng, batch=6, length=5):
  """(rewards, context) with garbage outside of the mask."""
  mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.float32)
  mask[0] = 1.0

  def draw(values):
    garbage = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), mask.shape)
    return np.where(mask > 0, values, garbage).astype(np.float32)

  rewards = draw(3 * rng.normal(size=mask.shape))
  context = RewardContext(
      mask=mask,
      expected_rewards=draw(rng.normal(size=mask.shape)),
      sft_entropy=draw(rng.exponential(size=mask.shape)),
      ref_entropy=draw(rng.exponential(size=mask.shape)),
  )
  return rewards, context


def _context(mask):
  return RewardContext(mask=np.asarray(mask, np.float32))


SPECS = {
    "scale": ("scale:0.3",),
    "clip": ("clip:1.5",),
    "clip_low_high": ("clip:-1:2",),
    "zscore": ("zscore",),
    "mask_unsure": ("mask_unsure:0.7",),
    "center": ("center",),
    "none": (),
    "ordered": ("center", "scale:0.5", "clip:0.4", "mask_unsure:0.7"),
}


def _naive(name, rewards, context, b, t):
  r, on = float(rewards[b, t]), context.mask > 0
  unsure = context.sft_entropy[b, t] > 0.7 and context.ref_entropy[b, t] > 0.7
  centered = r - float(context.expected_rewards[b, t])
  if name == "zscore":
    column = rewards[on[:, t], t].astype(np.float64)
    return (r - column.mean()) / np.sqrt(column.var() + 1e-6)
  return {
      "scale": 0.3 * r, "clip": min(max(r, -1.5), 1.5), "clip_low_high": min(max(r, -1.0), 2.0),
      "mask_unsure": 0.0 if unsure else r, "center": centered, "none": r,
      "ordered": 0.0 if unsure else min(max(0.5 * centered, -0.4), 0.4),
  }[name]


@pytest.mark.parametrize("name", SPECS)
def test_transforms_equal_loops_and_leave_zeros_in_the_padding(rng, name):
  rewards, context = _case(rng)
  got = np.asarray(jax.jit(parse(SPECS[name]))(rewards, context))
  assert got.dtype == np.float32
  for b, t in np.ndindex(rewards.shape):
    expected = _naive(name, rewards, context, b, t) if context.mask[b, t] else 0.0
    assert got[b, t] == pytest.approx(expected, abs=2e-5)


def test_order_matters():
  rewards, context = np.full((1, 1), 4.0, np.float32), _context(np.ones((1, 1)))
  assert float(parse(["scale:0.5", "clip:1"])(rewards, context)[0, 0]) == 1.0
  assert float(parse(["clip:1", "scale:0.5"])(rewards, context)[0, 0]) == 0.5


def test_integer_rewards_become_floats():
  got = parse(["scale:0.7"])(np.ones((1, 1), np.int32), _context(np.ones((1, 1))))
  assert float(got[0, 0]) == pytest.approx(0.7)


def test_a_function_of_ones_own_is_masked_like_the_others(rng):
  rewards, context = _case(rng)
  mine = lambda rewards, context: rewards + context.sft_entropy
  got = transforms.compose([transforms.scale(2.0), mine])(rewards, context)
  expected = np.where(context.mask > 0, 2 * rewards + context.sft_entropy, 0.0)
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("spec,says", [
    ("clamp:2", r"'clamp' is not one of scale, clip"),
    ("clip", r"expected clip:NATS"),
    ("clip:0", r"expected clip:NATS"),
    ("clip:-2", r"expected clip:NATS"),
    ("clip:2:1", r"expected clip:NATS"),
    ("clip:1:2:3", r"expected clip:NATS"),
    ("clip:nan", r"expected clip:NATS"),
    ("scale:half", r"expected scale:FACTOR"),
    ("scale:0", r"expected scale:FACTOR"),
    ("zscore:1", r"expected zscore"),
    ("mask_unsure:0", r"expected mask_unsure:NATS"),
    ("center", r"expected center, the first"),
])
def test_a_wrong_entry_is_named(spec, says):
  message = rf"transforms\[1\]='{spec}': {says}"
  with pytest.raises(ValueError, match=f"^{message}"):
    parse(["scale:2", spec])
  config = default_config()
  config.methods.dpr.transforms = ("scale:2", spec)
  with pytest.raises(UserError, match=rf"^config\.methods\.dpr: {message}"):
    resolve(config)


def test_what_the_rollouts_must_compute(rng):
  assert needs(["clip:2", "zscore"]) == frozenset()
  assert needs(["center", "mask_unsure:2"]) == {
      "expected_rewards", "sft_entropy", "ref_entropy"
  }
  bare = _context(np.ones((1, 1)))
  for spec, field in (("center", "expected_rewards"), ("mask_unsure:1", "sft_entropy")):
    with pytest.raises(ValueError, match=field):
      parse([spec])(np.ones((1, 1), np.float32), bare)


def test_centering_needs_a_pointwise_reward():
  config = default_config()
  config.methods.dpr.transforms, config.methods.dpr.returns = ("center",), "reward_to_go"
  resolve(config)
  config.methods.dpr.reward = LogLikelihood()
  resolve(config)
  config.methods.dpr.reward = Endogenous()
  with pytest.raises(UserError, match="config.methods.dpr: transforms: center .*'endogenous'"):
    resolve(config)
  config.methods.dpr.transforms = ("clip:1",)
  resolve(config)


def test_centered_reward_to_go_has_the_expected_gradient_of_per_token(rng):
  """By exact enumeration of all responses: the later tokens' centered rewards cancel."""
  vocab, length = 3, 3  # token 0 ends a response.
  rows = [y for n in range(1, length + 1) for y in itertools.product(range(vocab), repeat=n)
          if 0 not in y[:-1] and (y[-1] == 0 or n == length)]
  states = sorted({y[:t] for y in rows for t in range(len(y))})
  index = np.zeros((len(rows), length), np.int32)
  tokens, mask = np.zeros_like(index), np.zeros(index.shape, np.float32)
  for b, y in enumerate(rows):
    for t, a in enumerate(y):
      index[b, t], tokens[b, t], mask[b, t] = states.index(y[:t]), a, 1.0
  logits = rng.normal(size=(len(states), vocab))
  reward = rng.normal(size=(len(states), vocab))

  with jax.enable_x64(True):
    def logp(logits):
      table = jax.nn.log_softmax(logits, axis=-1)
      return jnp.where(mask > 0, table[index, tokens], 0.0)

    weight = np.exp(np.asarray(logp(logits)).sum(1))
    assert weight.sum() == pytest.approx(1.0)
    expected = (np.asarray(jax.nn.softmax(logits, axis=-1)) * reward).sum(1)
    context = RewardContext(mask=mask, expected_rewards=expected[index])
    raw = parse([])(reward[index, tokens], context)
    centered = parse(["center"])(reward[index, tokens], context)

    def gradient(rewards, kind):
      g = np.asarray(returns(rewards, mask, kind))
      return jax.grad(lambda x: jnp.sum(weight[:, None] * g * logp(x)))(jnp.asarray(logits))

    to_go = gradient(centered, "reward_to_go")
    np.testing.assert_allclose(to_go, gradient(raw, "per_token"), atol=1e-6)
    np.testing.assert_allclose(to_go, gradient(centered, "per_token"), atol=1e-6)
    assert np.abs(to_go - gradient(raw, "reward_to_go")).max() > 1e-3
