"""Transforms against loops; what stands in the padding never comes out."""

import numpy as np
import pytest

from dpr_jax.rewards import transforms

# Numpy warns of the garbage that the tests put into the padding.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def _case(rng, batch=6, length=5):
  mask = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.float32)
  mask[0] = 1.0
  garbage = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), mask.shape)
  return np.where(mask > 0, 3 * rng.normal(size=mask.shape), garbage).astype(np.float32), mask


@pytest.mark.parametrize("name", ["scale", "clip", "zscore", "none", "composed"])
def test_transforms_equal_loops_and_leave_zeros_in_the_padding(rng, name):
  rewards, mask = _case(rng)
  made = {
      "scale": transforms.scale(0.3),
      "clip": transforms.clip(-1.0, 2.0),
      "zscore": transforms.zscore_by_position(),
      "none": transforms.compose([]),
      "composed": transforms.compose([transforms.scale(0.5), transforms.clip(-1.0, 1.0)]),
  }[name]
  got = np.asarray(made(rewards, mask))
  for b, t in np.ndindex(mask.shape):
    r = float(rewards[b, t])
    if not mask[b, t]:
      assert got[b, t] == 0.0
      continue
    if name == "zscore":
      column = rewards[mask[:, t] > 0, t].astype(np.float64)
      expected = (r - column.mean()) / np.sqrt(column.var() + 1e-6)
    else:
      expected = {
          "scale": 0.3 * r, "clip": min(max(r, -1.0), 2.0), "none": r,
          "composed": min(max(0.5 * r, -1.0), 1.0),
      }[name]
    assert got[b, t] == pytest.approx(expected, abs=2e-5)


def test_order_matters(rng):
  rewards, mask = np.full((1, 1), 4.0, np.float32), np.ones((1, 1), np.float32)
  halve, clip = transforms.scale(0.5), transforms.clip(-1.0, 1.0)
  assert float(transforms.compose([halve, clip])(rewards, mask)[0, 0]) == 1.0
  assert float(transforms.compose([clip, halve])(rewards, mask)[0, 0]) == 0.5


def test_integer_rewards_become_floats(rng):
  got = transforms.compose([transforms.scale(0.7)])(np.ones((1, 1), np.int32), np.ones((1, 1)))
  assert float(got[0, 0]) == pytest.approx(0.7)
