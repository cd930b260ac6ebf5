"""What all doors share: exit codes and readable errors.

A door is `main(argv) -> None`. An error a user can make ends with exit code 2 and one line on
stderr; anything else is a bug and keeps its traceback.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dpr_jax.errors import UserError


def fail(message: str) -> NoReturn:
  """One line on stderr, exit code 2."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  raise SystemExit(2)


def run_door(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
  """Calls a door with the command line; turns a UserError into its line and exit code 2."""
  logging.getLogger("absl").setLevel(logging.WARNING)
  try:
    main(sys.argv[1:] if argv is None else argv)
  except UserError as e:
    fail(str(e))
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    raise SystemExit(130) from None
