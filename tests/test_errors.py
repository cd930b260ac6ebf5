"""Errors of one line, and what is put before them."""

import subprocess
import sys

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


@pytest.mark.parametrize("error, code, end", [
    ("UserError('bad')", 2, "error: bad"), ("Diverged('bad')", 1, "error: bad"),
    ("KeyError('bad')", 1, "KeyError: 'bad'"),
    ("Stopped(15)", 143, "stopped by SIGTERM; rerun the same command to resume"),
])
def test_an_error_ends_the_process_whatever_its_threads_wait_for(error, code, end):
  """As the threads of Orbax do, for each other, where a save has failed."""
  program = f"""
import threading
from dpr_jax import cli
from dpr_jax.cli import entry_point
from dpr_jax.errors import Diverged, Stopped, UserError
entry_point._PATIENCE = 0.5
def main(argv):
  threading.Thread(target=threading.Event().wait).start()
  raise {error}
cli.run_entry_point(main)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
  assert done.returncode == code
  assert done.stderr.splitlines()[-1] == end
