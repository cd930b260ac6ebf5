"""Which step is the reference."""

import dataclasses

import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError
from dpr_jax.rewards.references import (
    milestone_steps,
    reference_checkpoint,
    reference_step,
    reference_steps,
)


def test_milestones_are_steps_of_the_run_and_the_end_is_kept():
  assert milestone_steps((0.5, 0.25), 10) == {0.25: 2, 0.5: 5, 1.0: 10}
  assert milestone_steps((), 7) == {1.0: 7}
  assert reference_step(0.5, (0.25, 0.5), 10) == 5
  assert reference_step(1.0, (), 7) == 7


@pytest.mark.parametrize("fraction,steps", [(0.0, 10), (-0.5, 10), (1.5, 10), (0.01, 10)])
def test_fractions_outside_of_the_run_are_refused(fraction, steps):
  with pytest.raises(UserError, match="config.sft.milestones"):
    milestone_steps((fraction,), steps)


def test_a_reference_that_was_not_kept_is_refused():
  expected = r"config.reference.fraction=0.4 .*0.25.*config.sft.milestones"
  with pytest.raises(UserError, match=expected):
    reference_step(0.4, (0.25,), 100)


def test_half_data_is_a_run_of_its_own():
  config = resolve(default_config())
  half = dataclasses.replace(
      config, reference=dataclasses.replace(config.reference, kind="half_data", fraction=0.3)
  )
  assert reference_checkpoint(half) == ("ref", round(0.3 * config.sft.steps))
  assert reference_checkpoint(config) == ("sft", config.sft.steps // 2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-6])
def test_half_data_needs_a_share_that_gives_steps(fraction):
  with pytest.raises(UserError, match=r"config\.reference\.fraction"):
    reference_steps(fraction, 100)
