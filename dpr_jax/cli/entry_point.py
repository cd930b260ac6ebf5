"""How an entry point ends: exit codes and readable errors.

An entry point is `main(argv) -> None`. An error a user can make ends with exit code 2 and one line
on stderr, a run that diverged with 1, one that was preempted with 143; anything else is a bug and
keeps its traceback.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dpr_jax.errors import Diverged, Preempted, UserError


def fail(message: str) -> NoReturn:
  """One line on stderr, exit code 2."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  raise SystemExit(2)


def run_entry_point(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> None:
  """Calls `main` with the command line; turns a UserError into its line and exit code 2."""
  logging.getLogger("absl").setLevel(logging.WARNING)
  try:
    main(sys.argv[1:] if argv is None else argv)
  except UserError as e:
    fail(str(e))
  except (Diverged, Preempted) as e:
    print(f"error: {e}", file=sys.stderr)
    raise SystemExit(1 if isinstance(e, Diverged) else 143) from None
  except KeyboardInterrupt:
    print("interrupted; rerun the same command to resume from the last checkpoint", file=sys.stderr)
    raise SystemExit(130) from None
