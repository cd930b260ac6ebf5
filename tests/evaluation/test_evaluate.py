"""Which held-out prompts are evaluated."""

import types

import pytest

from dpr_jax.data.loader import Prompts
from dpr_jax.stages.evaluate import heldout_prompts


@pytest.mark.parametrize("num,skip,expected", [
    (3, 0, [0, 1, 2]), (3, 2, [2, 3, 4]), (0, 0, list(range(7))), (0, 5, [5, 6]),
])
def test_prompts_that_are_skipped_are_others(num, skip, expected):
  held = Prompts(tokens=list(range(7)), demos=list(range(7)), dropped_overlong=0)
  section = types.SimpleNamespace(num_prompts=num, skip_prompts=skip)
  run = types.SimpleNamespace(
      config=types.SimpleNamespace(eval=section), data=types.SimpleNamespace(heldout=held)
  )
  chosen = heldout_prompts(run)
  assert chosen.tokens == chosen.demos == expected
