"""The exceptions that end a run in one line.

Anything that is wrong with a file, a flag, a config field or a checkpoint is raised as
`UserError` with a single line that names the place (field, flag, or file and line) and states
what would be right. The entry points (`main`, `score`, ...) print that line and exit with code 2;
in a notebook it is an ordinary exception. Library code names its own arguments; the caller that
read them from a config or a flag adds that name (`naming`).
"""

import contextlib
import signal
from collections.abc import Iterator


def _one_line(message: str) -> str:
  line = " ".join(message.split())
  return line if len(line) <= 2000 else f"{line[:2000]}... (cut)"


class UserError(ValueError):
  """Bad input: one line that names the place and what would be right."""

  def __init__(self, message: str):
    super().__init__(_one_line(message))

  def at(self, where: str) -> "UserError":
    """The same error, of its own class, whose line begins with `where`."""
    self.args = (_one_line(f"{where}: {self}"),)
    return self


class Diverged(RuntimeError):
  """The loss or the gradient stopped being finite; the last checkpoint is from before."""


class StageEnded(RuntimeError):
  """An algorithm ends its stage before a step, for the reason given; that step was not made."""


class Stopped(BaseException):
  """SIGTERM or SIGINT ended the work where the same command goes on.

  Like KeyboardInterrupt no `Exception`, so that nothing goes on after it.

  Args:
    what: was saved and of what, in one line, "NAME: ..."; "" where the signal came in between.
  """

  def __init__(self, signum: int, what: str = ""):
    where, _, saved = what.partition(": ")
    name = signal.Signals(signum).name
    super().__init__(f"{where}: stopped by {name}; {saved}" if what else f"stopped by {name}")
    self.code = 128 + signum


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
  """Turns a ValueError of the block into a UserError that begins with `where`, a field or flag."""
  try:
    yield
  except UserError as e:  # It may be of a kind that is handled further out.
    raise e.at(where) from None
  except ValueError as e:
    raise UserError(f"{where}: {e}") from None
