"""Processes of one run that were not given the same thing find it out before they start.

Hosts have files, disks, checkouts and command lines of their own. Where they differ, a run would
train a mixture, or wait for ever in a collective that one process never comes to. `agree` compares
by way of the coordination service, which needs no device and no shared disk: either all processes
go on, or all of them end with an error that names what differs and in which process.
"""

import itertools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # The coordination service has no public interface.

from dpr_jax.errors import UserError
from dpr_jax.paths import refusal

T = TypeVar("T")

PROBE = ".seen_by_all_hosts"
_rounds = itertools.count()


def agree(
    make: Callable[[], T],
    facts: Callable[[T], Mapping[str, Any]] = lambda value: {},
    seconds: float = 60.0,
) -> T:
  """What `make` returns in this process, once all processes have come so far and agree.

  Every process must call it the same number of times.

  Args:
    facts: what of it must be the same in all processes, as JSON; compared in its order. A nested
      entry is called by its dotted path. Not called in a run of one process.
    seconds: how long the others may take longer than this process.

  Raises:
    UserError: process 0 and another have different facts, or `make` raised in another process.
    Exception: what `make` raised in this process.
  """
  process, processes = _processes()
  if processes == 1:
    return make()
  own, value, mine = None, None, {}
  try:
    value = make()
    mine = {"facts": dict(_flat(json.loads(json.dumps(facts(value)))))}
  except BaseException as e:
    own = e
    kind = "" if isinstance(e, UserError) else f"stopped by {type(e).__name__}: "
    mine = {"error": f"process {process}: {kind}{e}"}
  board = _Board(f"dpr_jax/agreement/{next(_rounds)}", seconds)
  if process == 0:
    board.put("lead", mine)
    others = (board.get(f"of_{i}", i) for i in range(1, processes))
    try:
      found = next(filter(None, itertools.chain([mine.get("error")], others)), "")
    except UserError as e:
      found = str(e)
    board.put("result", found)
  else:
    try:
      lead = board.get("lead", 0)
      board.put(f"of_{process}", mine.get("error") or _difference(lead, mine, process))
      found = board.get("result", 0)
    except UserError as e:
      found = str(e)
  if own is not None:
    raise own
  if found:
    raise UserError(found)
  return value


def check_shared(folder: Any, name: str) -> None:
  """Raises UserError, naming the folder by `name`, where a process has another one than process 0.

  Args:
    folder: a path that process 0 has made.
  """
  process, processes = _processes()
  if processes == 1:
    return
  probe, lead = folder / PROBE, process == 0

  def write() -> None:
    if lead:
      try:
        probe.write_text(secrets.token_hex(8))
      except OSError as e:
        raise UserError(f"{name} cannot be written: {refusal(e)}") from None

  def read() -> str:
    try:
      return probe.read_text()
    except OSError:
      raise UserError(f"{name} does not hold here what process 0 has written to it; name a folder "
                      "that all hosts share") from None

  agree(write)
  try:
    agree(read, lambda text: {f"a file in {name}": text})
  finally:
    if lead:
      probe.unlink(missing_ok=True)


def _processes() -> tuple[int, int]:
  """(index, number) of processes; `jax.process_count` would ask the devices, which come later."""
  state = distributed.global_state
  return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, Mapping) and value:
    for name, item in value.items():
      yield from _flat(item, f"{path}.{name}" if path else name)
  else:
    yield path, value


def _difference(lead: Mapping[str, Any], mine: Mapping[str, Any], process: int) -> str:
  """The first fact that differs from process 0, in words; "" if none does."""
  if "error" in lead:
    return ""
  theirs, own = lead["facts"], mine["facts"]
  show = lambda facts, name: f"{facts[name]!r:.80}" if name in facts else "missing"
  for name in dict.fromkeys([*theirs, *own]):
    if name not in theirs or name not in own or theirs[name] != own[name]:
      return (f"{name}: {show(own, name)} in process {process}, {show(theirs, name)} in process 0; "
              "all processes of a run need the same")
  return ""


class _Board:
  """Values that processes leave for each other at the coordination service."""

  def __init__(self, prefix: str, seconds: float):
    self._client, self._prefix = distributed.global_state.client, prefix
    self._seconds = seconds

  def put(self, name: str, value: Any) -> None:
    self._client.key_value_set(f"{self._prefix}/{name}", json.dumps(value))

  def get(self, name: str, process: int) -> Any:
    """What `process` has put, or will put.

    Raises:
      UserError: it does not in time.
    """
    try:
      # Process 0 answers after it has waited for all others.
      milliseconds = round(1000 * self._seconds * (2 if name == "result" else 1))
      found = self._client.blocking_key_value_get(f"{self._prefix}/{name}", milliseconds)
    except jax.errors.JaxRuntimeError as e:
      raise UserError(f"process {process} has not come as far as process {_processes()[0]} "
                      f"within {self._seconds:g} s: {str(e):.100}") from None
    return json.loads(found)
