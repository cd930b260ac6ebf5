"""Scores of responses with garbage around them."""

import numpy as np
import pytest

BAD = np.array([np.nan, np.inf, -np.inf], np.float32)


@pytest.fixture
def make_arrays(rng):
  """make_arrays(count) -> `count` float32 [B, T] arrays, garbage outside of the mask; and it."""

  def make(count, batch=5, length=8):
    first = rng.integers(0, 3, (batch, 1))
    last = first + rng.integers(1, length - 2, (batch, 1))
    column = np.arange(length)
    mask = ((column >= first) & (column < last)).astype(np.float32)
    garbage = lambda: rng.choice(BAD, mask.shape)
    arrays = [
        np.where(mask > 0, -rng.exponential(size=mask.shape), garbage()).astype(np.float32)
        for _ in range(count)
    ]
    return *arrays, mask

  return make
