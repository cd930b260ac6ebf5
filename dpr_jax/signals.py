"""SIGTERM and SIGINT end a process where the same command can go on.

While an entry point runs (`handled`), the first signal raises `Stopped` at once. Work that would be
lost defers it (`deferred`) and asks after each of its units, a training step or a block of
responses, whether it is to stop (`reached`). Later signals change nothing. In a run of several
processes a signal to one of them stops all of them, after the same unit (see peers.py).
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from dpr_jax import peers
from dpr_jax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: int | None = None
_deferring = False


def _handler(signum: int, frame) -> None:
  global _received
  if _received is not None:
    return
  _received = signum
  peers.announce(signum)
  if not _deferring and not peers.several():
    raise Stopped(signum)


@contextlib.contextmanager
def handled(restore: bool = True) -> Iterator[None]:
  """Handles both signals in the block, if they are not ignored and this is the main thread.

  Args:
    restore: how they were handled before; False where the process ends behind the block, and
      ignores them there.
  """
  global _received
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {s: signal.getsignal(s) for s in _SIGNALS}
  before = {s: old for s, old in before.items() if old not in (signal.SIG_IGN, None)}
  _received = None
  for s in before:
    signal.signal(s, _handler)
  try:
    yield
  finally:
    _received = None if restore else _received
    for s, old in before.items():
      # Python itself gives up its handlers before it has ended.
      signal.signal(s, old if restore else signal.SIG_IGN)


def reached() -> int | None:
  """The signal upon which to stop here, after a unit of work; None to go on.

  Every process must ask after every unit.
  """
  return peers.reached() if peers.several() else _received


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """A block that asks `reached`; a signal that it did not see any more raises behind it."""
  global _deferring
  outer, _deferring = _deferring, True
  try:
    yield
  finally:
    _deferring = outer
  if _received is not None and not outer and not peers.several():
    raise Stopped(_received)


def stoppable(update: Callable[[int], object]) -> Callable[[int], None]:
  """`update`, after which the work ends if a signal to any process says so."""

  def updated(n: int) -> None:
    update(n)
    if (signum := reached()) is not None:
      raise Stopped(signum)

  return updated
