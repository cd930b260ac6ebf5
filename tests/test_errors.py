"""Errors of one line, and what is put before them."""

import pytest

from dpr_jax.errors import UserError, naming
from dpr_jax.training.checkpoints import DamagedCheckpoint


def test_naming_keeps_what_an_error_is():
  damaged = DamagedCheckpoint("run/sft/checkpoints", 24, "proof")
  with pytest.raises(DamagedCheckpoint, match="^config.reference: run/sft/checkpoints: ") as caught:
    with naming("config.reference"):
      raise damaged
  assert (caught.value.step, caught.value.earlier) == (24, True)
  with pytest.raises(UserError, match="^--mesh: no"):
    with naming("--mesh"):
      raise ValueError("no")


def test_a_message_is_one_line_of_bounded_length():
  assert str(UserError("a\nb  c")) == "a b c"
  assert len(str(UserError("x" * 5000).at("where"))) < 2020
