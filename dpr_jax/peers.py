"""The other processes of a run: when all of them stop, and what ends them if one is lost.

A thread of every process reports to the coordinator that it lives and what its main thread has
done, and reads what the others report.

A stop (a signal to any process) is agreed on as in JAX's preemption service: each process says how
many units of work it has asked after and holds at the next one, until all know the largest number;
they stop after the unit that follows. A process that ended in an error, that has not been heard of
for `SECONDS`, or for which the others wait at a barrier without its doing anything for as long, is
named in one line, and the others end. So do they where the coordinator, process 0, is killed: their
relay (relay.py) tells them.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dpr_jax import relay
from dpr_jax.errors import UserError

SECONDS = 40.0  # DPR_PEER_SECONDS: the patience with a process that shows no sign of life.
_PREFIX = "dpr_jax/peers"
_TELL_SECONDS = 3.0
_GONE_SECONDS = 15.0  # after which a process without its coordinator ends, whatever it does.


class Peers:
  """What this process knows of the others."""

  def __init__(self, client: Any, index: int, count: int, seconds: float, service: Any = None):
    self._client, self.index, self.count, self._seconds = client, index, count, seconds
    self._lock = threading.Condition()
    self._asked, self._stop_at, self._agreeing = 0, None, False
    self._signal: int | None = None  # received here.
    self._stop_signal: int | None = None  # received by any process.
    self._place, self._waiting = 0, None  # barriers entered; since when, in one.
    self._main = threading.main_thread().ident
    self._name = f"{socket.gethostname()}:{os.getpid()}"
    self._seen: dict[int, tuple[str, str, float, float]] = {}  # report, name, changed, progressed.
    self._ended: dict[int, tuple[int, str]] = {}
    self._heard = time.monotonic()  # The coordinator answered last.
    self._service, self._gone, self._exiting = service, False, threading.Lock()
    self._closed = threading.Event()
    for work in (self._watch, self._end_if_lost, *([self._watch_service] if service else [])):
      threading.Thread(target=work, daemon=True).start()

  # --- The main thread ---------------------------------------------------------------------------

  def announce(self, signum: int) -> None:
    self._signal = self._signal or signum

  def reached(self) -> int | None:
    with self._lock:
      while self._agreeing and self._stop_at is None:
        self._lock.wait(0.2)
      self._asked += 1
      stop = self._stop_at is not None and self._asked >= self._stop_at
      return self._stop_signal if stop else None

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    self._place, self._waiting = self._place + 1, time.monotonic()
    try:
      yield
    finally:
      self._waiting = None

  def end(self, code: int, message: str = "") -> None:
    """Tells the others that this process ends; a code other than 0 ends them too."""
    if self._closed.is_set():
      return
    self._closed.set()

    def tell() -> None:
      with contextlib.suppress(Exception):
        self._client.key_value_set(f"{_PREFIX}/end/{self.index}", f"{code} {self._name} {message}")

    if not code:  # As Python ends, where no thread can begin.
      return tell()
    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(_TELL_SECONDS)  # A coordinator that is stuck or gone does not answer.

  def wait_for_ends(self, seconds: float = 6.0) -> None:
    """Waits, in the coordinator, until the others have ended too: they cannot read without it."""
    end = time.monotonic() + seconds
    with contextlib.suppress(Exception):
      while time.monotonic() < end:
        if len(self._client.key_value_dir_get(f"{_PREFIX}/end/")) >= self.count:
          return
        time.sleep(0.1)

  def find_lost(self) -> tuple[int, str] | None:
    """(exit code, line) of the process for which this one fails, waiting until that shows."""
    self._waiting = time.monotonic()
    end = self._waiting + self._seconds + 5
    while time.monotonic() < end:
      if found := self._lost():
        return found
      time.sleep(0.2)
    return None

  # --- The threads -------------------------------------------------------------------------------

  def _end_if_lost(self) -> None:
    """A thread of its own: a request to a coordinator that is stuck does not return."""
    while not self._closed.wait(0.5):
      if (lost := self._lost()) and not self._closed.wait(3):  # Time to say what failed here.
        # Why the coordinator has gone may have been told by then.
        self._exit(*((self._lost() or lost) if self._gone else lost))

  def _watch(self) -> None:
    tick, progress, looked = 0, 0, None
    pause = max(0.5, self.count / 200)  # Of all processes, some hundred requests per second.
    while not self._closed.wait(pause):
      tick += 1
      # The main thread does something if it is elsewhere in the program, or uses the processor.
      frame, used = sys._current_frames().get(self._main), time.process_time()
      here = [] if frame is None else [id(frame), frame.f_lasti]
      if looked is None or here != looked[0] or used - looked[1] > 0.3 * pause:
        progress += not self._waiting
      looked = here, used
      try:
        report = f"{tick} {progress} {self._place} {self._name}"
        self._client.key_value_set(f"{_PREFIX}/beat/{self.index}", report, allow_overwrite=True)
        if self._signal is not None and self._stop_signal is None:
          with contextlib.suppress(Exception):  # Another one was first.
            self._client.key_value_set(f"{_PREFIX}/stop", str(self._signal))
        self._read(dict(self._client.key_value_dir_get(f"{_PREFIX}/")))
        self._heard = time.monotonic()
      except Exception:  # Of the connection; `_lost` says so if it lasts.
        continue

  def _watch_service(self) -> None:
    self._gone = self._service.stdout.readline().strip() == relay.GONE
    if self._gone:  # Usual where all have ended, but then this process ends in a moment, too.
      time.sleep(_GONE_SECONDS)
      self._exit(1, self._coordinator_gone())

  def _coordinator_gone(self) -> str:
    return f"process 0{self._of(0)}, the coordinator, is gone: its connection has broken"

  def _read(self, found: dict[str, str]) -> None:
    now = time.monotonic()
    for key, value in found.items():
      kind, _, index = key.removeprefix(f"{_PREFIX}/").partition("/")
      if kind == "end":
        code, _, rest = value.partition(" ")
        self._ended[int(index)] = int(code), rest
      elif kind == "beat":
        _, progress, place, name = value.split(" ", 3)
        old = self._seen.get(int(index))
        changed = old[2] if old and old[0] == value else now
        progressed = old[3] if old and old[0].split(" ")[1] == progress else now
        self._seen[int(index)] = value, name, changed, progressed
      elif kind == "stop" and self._stop_at is None:
        self._agree(int(value))

  def _agree(self, signum: int) -> None:
    """Finds the unit after which all processes stop."""
    with self._lock:
      self._agreeing, self._stop_signal = True, signum
      asked = self._asked
    self._client.key_value_set(f"{_PREFIX}/asked/{self.index}", str(asked), allow_overwrite=True)
    wait = int(1000 * self._seconds)
    numbers = [
        int(self._client.blocking_key_value_get(f"{_PREFIX}/asked/{i}", wait))
        for i in range(self.count)
    ]
    with self._lock:
      self._stop_at = max(numbers) + 1
      self._lock.notify_all()

  def _of(self, index: int) -> str:
    return f" ({self._seen[index][1]})" if index in self._seen else ""

  def _lost(self) -> tuple[int, str] | None:
    now = time.monotonic()
    for index, (code, rest) in self._ended.items():
      if code and index != self.index:
        name, _, message = rest.partition(" ")
        return code, f"process {index} ({name}) ended: {message}"
    if self._gone:
      return 1, self._coordinator_gone()
    if now - self._heard > self._seconds:
      return 1, f"process 0{self._of(0)}, the coordinator, does not answer; it is dead or stuck"
    for index, (report, _, changed, progressed) in self._seen.items():
      if index == self.index or index in self._ended:
        continue
      if now - changed > self._seconds:
        return 1, (f"process {index}{self._of(index)} has not been heard of for "
                   f"{now - changed:.0f} s; it is dead or stuck")
      since = self._waiting
      behind = int(report.split(" ")[2]) < self._place
      if since and behind and min(now - since, now - progressed) > self._seconds:
        return 1, (f"process {index}{self._of(index)} is stuck: the others wait for it, and it has "
                   f"done nothing for {now - progressed:.0f} s")
    return None

  def _exit(self, code: int, line: str) -> None:
    if not self._exiting.acquire(blocking=False):
      return  # Another thread has said why.
    try:
      print(f"error: {line}; process {self.index} ends", file=sys.stderr, flush=True)
      self.end(code, line)
      if self.index == 0:
        self.wait_for_ends()
    finally:
      os._exit(code)  # The main thread may wait for ever, and jax.distributed for its shutdown.


_peers: Peers | None = None


def patience() -> float:
  """DPR_PEER_SECONDS, else `SECONDS`.

  Raises:
    UserError: it is no number of seconds of at least 5.
  """
  text = os.environ.get("DPR_PEER_SECONDS") or str(SECONDS)
  if not text.replace(".", "", 1).isdecimal() or float(text) < 5:
    raise UserError(f"DPR_PEER_SECONDS={text!r} must be a number of seconds of at least 5")
  return float(text)


def start(seconds: float = SECONDS, service: Any = None) -> None:
  """Begins to watch the other processes, once `jax.distributed` has connected to them.

  Args:
    service: the relay to the coordination service; None in the process that has the service.
  """
  global _peers
  import atexit

  from jax._src import distributed

  state = distributed.global_state
  if _peers is not None or state.client is None or (state.num_processes or 1) < 2:
    return
  _peers = Peers(state.client, state.process_id, state.num_processes, seconds, service)
  atexit.register(_peers.end, 0)  # Before JAX disconnects.


def several() -> bool:
  return _peers is not None


def announce(signum: int) -> None:
  """Notes a signal, for all processes; safe in a signal handler."""
  if _peers is not None:
    _peers.announce(signum)


def reached() -> int | None:
  """The signal upon which all processes stop after this unit of work; None to go on."""
  return _peers.reached() if _peers is not None else None


def waiting():
  """A block in which this process waits for the others."""
  return _peers.waiting() if _peers is not None else contextlib.nullcontext()


def find_lost() -> tuple[int, str] | None:
  """Of a failure of JAX: (exit code, line) of the process that is lost; None if none is."""
  return _peers.find_lost() if _peers is not None else None


def end(code: int, message: str) -> None:
  """Ends the other processes too, and this one without waiting for them."""
  if _peers is None:
    return
  _peers.end(code, message)
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
    sys.stderr.flush()
  if _peers.index == 0:
    _peers.wait_for_ends()
  os._exit(code)
