"""How a benchmark drives its sides: one process each, which does one round per request.

A side is a workload with three methods:

    setup() -> facts      builds everything, compiles, warms up
    round() -> seconds    {variant: seconds of one timed call}
    finish() -> facts     what is known at the end, such as peak memory

`serve` speaks for a workload over stdin and stdout, a JSON object a line; `Process` is the
other end, and `InProcess` does without a process. Only the standard library is used here: a
peer's environment need not have anything of ours.
"""

import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Unavailable(Exception):
  """The side cannot run here: a package is missing, or it lacks the task. The text says which."""


class Failed(Exception):
  """The side's process ended with an error."""


def peak_host_bytes() -> int:
  """The most memory this process has had resident, in bytes; of this process image alone.

  getrusage would carry over the peak of the process that started this one.
  """
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) * 1024
  raise OSError("/proc/self/status has no VmHWM")


def warm_up(call: Callable[[], float]) -> float:
  """Calls three times; what the first two took beyond the third is the time of compilation.

  A jitted step may compile twice: its second call gets arrays that its first one placed.

  Args:
    call: returns the seconds that it took.
  """
  first, second, third = call(), call(), call()
  return max(first + second - 2 * third, 0.0)


def serve(make_workload: Callable[[], Any]) -> None:
  """Runs a workload for the process at the other end of stdin and stdout."""
  # Whatever a library prints must not end up between our lines.
  channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)

  def send(message: Mapping[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()

  try:
    workload = make_workload()
    send({"ready": workload.setup()})
  except (ImportError, Unavailable) as e:
    send({"unavailable": f"{e}"})
    return
  for line in sys.stdin:
    if line.strip() == "round":
      send({"seconds": workload.round()})
    elif line.strip() == "finish":
      send({"facts": workload.finish()})
      channel.close()
      sys.stderr.flush()
      os._exit(0)  # Threads of a peer's trainer may be waiting for a next step indefinitely.


class InProcess:
  """A workload of this process."""

  def __init__(self, workload: Any):
    self._workload = workload

  def setup(self) -> dict[str, Any]:
    return self._workload.setup()

  def round(self) -> dict[str, float]:
    return self._workload.round()

  def finish(self) -> dict[str, Any]:
    return self._workload.finish()

  def close(self) -> None:
    self._workload = None


class Process:
  """A workload of a process of its own, which calls `serve`."""

  def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
    self._command = list(command)
    self._stderr = tempfile.TemporaryFile(mode="w+", encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    self._process = subprocess.Popen(
        self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        text=True, cwd=ROOT,
        env={
            # Sides may share a device.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **(env or {}),
            # The time of a compilation is reported, so none may come from a cache.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONPATH": path,
        },
    )

  def _ask(self, message: str | None, key: str) -> Any:
    if message is not None:
      try:
        self._process.stdin.write(message + "\n")
        self._process.stdin.flush()
      except BrokenPipeError:
        pass  # The answer below is missing, and says why.
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._stderr.seek(0)
      said = self._stderr.read().strip()[-3000:]
      raise Failed(f"{' '.join(self._command)} ended with {self._process.returncode}:\n{said}")
    answer = json.loads(line)
    if "unavailable" in answer:
      raise Unavailable(answer["unavailable"])
    return answer[key]

  def setup(self) -> dict[str, Any]:
    return self._ask(None, "ready")

  def round(self) -> dict[str, float]:
    return self._ask("round", "seconds")

  def finish(self) -> dict[str, Any]:
    return self._ask("finish", "facts")

  def close(self) -> None:
    self._process.kill()
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._stderr):
      file.close()


class Stepped:
  """A trainer that owns its loop, made to do one step a round.

  It runs in a thread; its hooks call `begin` before a step, which waits for the next round,
  and `end` after it.
  """

  def __init__(self, train: Callable[["Stepped"], None]):
    self._go = threading.Semaphore(0)
    self._results: queue.Queue[float | BaseException] = queue.Queue()
    self._start = 0.0

    def run() -> None:
      try:
        train(self)
        self._results.put(RuntimeError("the trainer ended before it was told to"))
      except BaseException as e:  # Raised where the round is waited for.
        self._results.put(e)

    threading.Thread(target=run, daemon=True).start()

  def begin(self) -> None:
    self._go.acquire()
    self._start = time.perf_counter()

  def end(self) -> None:
    self._results.put(time.perf_counter() - self._start)

  def round(self) -> float:
    """Seconds of one step."""
    self._go.release()
    result = self._results.get()
    if isinstance(result, BaseException):
      raise result
    return result
