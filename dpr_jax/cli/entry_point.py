"""How an entry point ends: exit codes and readable errors.

An entry point is `main(argv) -> None`. An error a user can make ends with exit code 2 and one line
on stderr, a run that diverged with 1, one that was stopped by SIGINT or SIGTERM with 130 or 143;
anything else is a bug and keeps its traceback.
"""

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from dpr_jax import peers, signals
from dpr_jax.errors import Diverged, Stopped, UserError

# How JAX calls the errors of its runtime, of a collective whose other end is gone among them.
_RUNTIME_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_PATIENCE = 10.0  # seconds for threads, after an error or a signal.


def readable(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """Makes a UserError of what the machine refuses, wherever an entry point meets it.

  A full or read-only disk, a path that cannot be, too many open files.
  """

  @functools.wraps(main)
  def wrapped(argv: Sequence[str]) -> None:
    for arg in argv:
      if "\0" in arg:
        raise UserError(f"{arg.partition('=')[0]}: its value holds a NUL character")
    try:
      main(argv)
    except UserError:
      raise
    except OSError as e:
      if e.strerror is None:
        raise
      place = "" if e.filename is None else f"{str(e.filename)[:200]}: "
      raise UserError(f"{place}{e.strerror}") from e
    except Exception as e:
      if type(e).__module__.partition(".")[0] != "gcsfs":
        raise
      raise UserError(f"Google Cloud Storage: {e}") from e

  return wrapped


def _was_raised_too(record: logging.LogRecord) -> bool:
  """Leaves out the tracebacks that the threads of Orbax log of errors which it raises as well."""
  return not record.exc_info


def _print_traceback(kind, error, trace) -> None:
  """Leaves out what TensorStore prints where Orbax no longer waits for what has failed."""
  if str(error) != "Event loop is closed":
    sys.__excepthook__(kind, error, trace)


def _print_unraisable(unraisable) -> None:
  """Leaves out an event loop that was never made, for want of files: that error is raised as well.
  """
  if getattr(unraisable.object, "__qualname__", "") != "BaseEventLoop.__del__":
    sys.__unraisablehook__(unraisable)


def _end(code: int, process: bool) -> NoReturn:
  """Raises SystemExit.

  Args:
    process: whether this process ends, rather than a caller handles it. It does not wait for ever
      for threads then: those of a save that has failed wait for each other.
  """
  if process:
    timer = threading.Timer(_PATIENCE, os._exit, [code])
    timer.daemon = True
    timer.start()
    if not peers.several():  # Those take leave of each other as Python ends.
      atexit._run_exitfuncs()  # As multiprocessing ends a process.
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    if not peers.several():
      os._exit(code)  # Python may abort while it ends, if a daemon thread writes at that moment.
  raise SystemExit(code) from None


def run_entry_point(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str] | None = None,
    kept: str = "rerun the same command to resume",
) -> None:
  """Calls `main` with the command line; turns a UserError into its line and exit code 2.

  Args:
    kept: what a signal leaves, for its line.
  """
  logging.getLogger("absl").setLevel(logging.WARNING)
  logging.getLogger("absl").addFilter(_was_raised_too)
  if argv is None:
    sys.excepthook = _print_traceback
    sys.unraisablehook = _print_unraisable
    # Of a save that has failed, as above.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  try:
    with signals.handled(restore=argv is not None):
      try:
        main(sys.argv[1:] if argv is None else argv)
      except Exception as e:
        if type(e).__name__ in _RUNTIME_ERRORS and (lost := peers.find_lost()):
          code, line = lost
          print(f"error: {line}", file=sys.stderr)
          peers.end(code, line)
        raise
  except (UserError, Diverged) as e:
    code = 2 if isinstance(e, UserError) else 1
    print(f"error: {e}", file=sys.stderr)
    peers.end(code, str(e))
    _end(code, argv is None)
  except Stopped as e:
    print(f"{e}; {kept}", file=sys.stderr)
    _end(e.code, argv is None)
  except KeyboardInterrupt:
    print(f"stopped by SIGINT; {kept}", file=sys.stderr)
    _end(130, argv is None)
  except Exception as e:
    if argv is not None and not peers.several():
      raise
    sys.excepthook(*sys.exc_info())
    peers.end(1, f"{type(e).__name__}: {str(e)[:200]}")
    _end(1, argv is None)
