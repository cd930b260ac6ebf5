"""The exceptions that end a run in one line.

Anything that is wrong with a file, a flag, a config field or a checkpoint is
raised as `UserError` with a single line that names the place (field, flag, or
file and line) and says what would be right. The doors (`main`, `score`, ...)
print that line and exit with code 2; in a notebook it is an ordinary exception.
"""


class UserError(ValueError):
  """Bad input: one line that names the place and what would be right."""

  def __init__(self, message: str):
    super().__init__(" ".join(message.split()))


class Diverged(RuntimeError):
  """The loss or the gradient stopped being finite; the last checkpoint is from before."""


class StageEnded(RuntimeError):
  """An algorithm ends its stage before a step, for the reason given; that step was not made."""


class Preempted(RuntimeError):
  """The machines were told to end (SIGTERM); a checkpoint of this step is saved."""
