"""A folder that one run at a time writes to: the file .lock in it names who.

The file is refreshed while its run goes on. It is taken over if its process is dead, which shows at
once on the same machine, and on another by a file that is not refreshed for `STALE` seconds. That
long waits a run that was moved to another machine. In a bucket it is an object (bucket_lock.py).
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import platform
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dpr_jax.bucket_lock import BucketLock
from dpr_jax.errors import UserError
from dpr_jax.paths import Path, in_bucket, modified, refusal

_log = logging.getLogger(__name__)

FILE = ".lock"
REFRESH, STALE = 10.0, 120.0  # seconds


class _InUse(Exception):
  def __init__(self, holder: dict[str, Any]) -> None:
    super().__init__(f"process {holder['pid']} on {holder.get('host')}" if holder
                     else "another run")


def _text(path: str) -> str:
  with contextlib.suppress(OSError):
    return pathlib.Path(path).read_text().strip()
  return ""


def _machine() -> str:
  """What a process id means something on: the machine since its start, and its container."""
  space = ""
  with contextlib.suppress(OSError):
    space = os.readlink("/proc/self/ns/pid")
  return f"{_text('/proc/sys/kernel/random/boot_id') or socket.gethostname()} {space}"


def _started(pid: int) -> str | None:
  """When a process of this machine started, in the kernel's ticks; None if it is dead."""
  if platform.system() != "Linux":
    try:
      os.kill(pid, 0)
    except PermissionError:  # Another user's.
      pass
    except OSError:
      return None
    return ""
  # Behind the name, which may hold anything: the state, and as the 20th field the start.
  fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
  return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _own() -> dict[str, Any]:
  pid = os.getpid()
  return {"host": socket.gethostname(), "pid": pid, "started": _started(pid),
          "machine": _machine(), "token": secrets.token_hex(8)}


def _parse(content: bytes) -> dict[str, Any]:
  """Who holds the lock, {} if it says nothing."""
  try:
    found = json.loads(content)
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}
  except (ValueError, RecursionError):
    return {}


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """Who holds the lock; None if there is no file, {} if it says nothing."""
  try:
    return _parse(path.read_bytes())
  except FileNotFoundError:
    return None


def _age(path: Path) -> float:
  """Seconds since the file was refreshed, by the clock of its file system."""
  probe = path.with_name(f"{FILE}.{secrets.token_hex(4)}")
  try:
    probe.write_bytes(b"")
    return modified(probe) - modified(path)
  except FileNotFoundError:
    return STALE + 1
  finally:
    probe.unlink(missing_ok=True)


def _refreshed(path: Path) -> float | None:
  """When the file was refreshed; None if it is gone."""
  with contextlib.suppress(FileNotFoundError):
    return modified(path)
  return None


def _alive(path: Path, holder: dict[str, Any]) -> bool:
  """Whether the holder still runs; of one on another machine, which may be gone, it is awaited."""
  if holder and holder.get("machine") == _machine():
    return _started(holder["pid"]) == holder.get("started")
  seen, told = _refreshed(path), False
  while _age(path) <= STALE:
    if not told:
      _log.warning("%s: waiting up to %g s to see whether its run, on another machine, goes on",
                   path, STALE)
    told = True
    time.sleep(min(1.0, REFRESH))
    if (now := _refreshed(path)) != seen:
      return now is not None
  return False


def _check(path: Path, holder: dict[str, Any]) -> None:
  """Raises _InUse unless the lock is stale."""
  if _alive(path, holder):
    raise _InUse(holder)


def _create(path: pathlib.Path, own: dict[str, Any]) -> bool:
  """Whether there was no lock; its file appears with its content."""
  draft = path.with_name(f"{FILE}.{own['token']}")
  draft.write_text(json.dumps(own) + "\n", encoding="utf-8")
  try:
    os.link(draft, path)
    return True
  except FileExistsError:
    return False
  except OSError:  # A file system without hard links.
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
      file.write(json.dumps(own) + "\n")
      return True
    return False
  finally:
    draft.unlink(missing_ok=True)


def _take(path: pathlib.Path, own: dict[str, Any]) -> None:
  """Puts `own` into the file `path`.

  A stale one is removed by who holds the lock that is named after its content: two that find it at
  the same time cannot both remove it, of which the second would remove the lock of the first.

  Raises:
    _InUse: another has it, or is taking it over.
  """
  while not _create(path, own):
    holder = _read(path)
    if holder is None:
      continue
    if holder.get("token") == own["token"]:  # A network file system answered twice.
      return
    _check(path, holder)
    content = json.dumps(holder, sort_keys=True).encode()
    claim = path.with_name(f"{path.name}.{hashlib.sha256(content).hexdigest()[:16]}")
    _take(claim, own)
    try:
      if _read(path) == holder:
        path.unlink(missing_ok=True)
    finally:
      claim.unlink(missing_ok=True)


def _release(path: pathlib.Path, own: dict[str, Any]) -> None:
  if (_read(path) or {}).get("token") == own["token"]:
    path.unlink(missing_ok=True)


def _touch(path: pathlib.Path, own: dict[str, Any]) -> bool:
  """Refreshes the file, unless another run has it."""
  mine = (_read(path) or own).get("token") == own["token"]
  if mine:
    os.utime(path)
  return mine


def _refresh(touch: Callable[[], bool], path: Path, ended: threading.Event) -> None:
  """Until the end; a process that was suspended so long that another run began must not go on."""
  while not ended.wait(REFRESH):
    with contextlib.suppress(OSError):
      if not touch() and not ended.is_set():
        print(f"error: {path}: another run has taken the folder over, for this process was "
              f"suspended for more than {STALE:g} s; it ends", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
  """Process 0 holds the lock of a folder, which is made if need be, in the block.

  Args:
    name: of the flag that names the folder, for errors.

  Raises:
    UserError: another run holds it, or the folder cannot be written.
  """
  import jax

  if jax.process_index():
    yield
    return
  path, own, made = folder / FILE, _own(), []
  bucket = BucketLock(path, own) if in_bucket(path) else None
  try:
    if bucket:
      bucket.take(lambda content: _check(path, _parse(content)))
    else:
      made = [p for p in (folder, *folder.parents) if not p.exists()]
      folder.mkdir(parents=True, exist_ok=True)
      _take(path, own)
  except _InUse as e:
    raise UserError(f"{name}={folder} is in use by {e}; wait for it or end it, or name another "
                    f"folder (if that process is gone, delete {path})") from None
  except OSError as e:
    raise UserError(f"{name}={folder} cannot be written: {refusal(e)}") from None
  ended = threading.Event()
  touch = bucket.refresh if bucket else functools.partial(_touch, path, own)
  threading.Thread(target=_refresh, args=(touch, path, ended), daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    with contextlib.suppress(OSError):
      bucket.release() if bucket else _release(path, own)
    for place in made:  # Where nothing was written, nothing is left.
      with contextlib.suppress(OSError):
        place.rmdir()
