"""Metrics of a stage: metrics.jsonl, TensorBoard and a progress bar.

Device scalars are fetched one step late, so that the device never waits for the host.
Only process 0 writes. After a resume no step occurs twice: lines beyond the restored
step are cut before the first new one.
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpr_jax import fingerprints
from dpr_jax.errors import Diverged, UserError
from dpr_jax.paths import Appender, Mirror, Path, as_path, aside, write_atomically

_log = logging.getLogger(__name__)


def _parse(
    path: str | os.PathLike, keys: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[int]]:
  """The lines of a metrics.jsonl, and the numbers of those that are damaged or lack `keys`."""
  lines, damaged, path = [], [], as_path(path)
  if not path.exists():
    return lines, damaged
  *whole, _ = path.read_bytes().split(b"\n")  # A last line without its end was never finished.
  for number, raw in enumerate(whole, 1):
    try:
      line = json.loads(raw)
    except (ValueError, RecursionError):
      line = None
    if isinstance(line, dict) and all(isinstance(line.get(k), int | float) for k in keys):
      lines.append(line)
    else:
      damaged.append(number)
  return lines, damaged

_LEAST_SHARE = 0.1  # of the sampled tokens, below which somebody is told.


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; a torn last line is dropped, a damaged one left out and named."""
  lines, damaged = _parse(path)
  if damaged:
    _log.warning("%s: %s damaged, and left out", path, _numbers(damaged))
  return lines


def _numbers(damaged: Sequence[int]) -> str:
  several = f"lines {', '.join(map(str, damaged[:5]))}{', ...' * (len(damaged) > 5)} are"
  return several if len(damaged) > 1 else f"line {damaged[0]} is"


def _digest(texts: Iterable[str]) -> Any:
  return hashlib.blake2b("".join(texts).encode(), digest_size=8)


def read_until(
    path: Path, step: int, fingerprint: str | None
) -> tuple[list[dict[str, Any]], list[int]]:
  """The lines of a metrics.jsonl up to `step`, and the numbers of damaged lines.

  Args:
    fingerprint: of those lines, as the checkpoint of that step has it; None of an older checkpoint.

  Raises:
    UserError: they are not those that the stage wrote.
  """
  lines, damaged = _parse(path, ("step", "loss", "tokens", "seconds"))
  kept = [line for line in lines if line["step"] <= step]
  now = _digest(json.dumps(line) + "\n" for line in kept).hexdigest()
  if step and (not kept or kept[-1]["step"] != step) or fingerprint not in (None, now):
    raise UserError(
        f"{path} was cut or edited: its lines up to step {step}, from which the stage goes on, are "
        "not those it wrote; restore it from a copy, or train the stage again: "
        f"{aside(path.parent / 'checkpoints')} and run the same command"
    )
  return kept, damaged


class MetricsWriter:
  """Writes the metrics of one stage; a context manager.

  A line has `step`, `loss`, `tokens` (trained since the stage began), `seconds` (of the
  stage, earlier runs included) and whatever the step reported.

  Args:
    fingerprint: see `read_until`, which it raises the error of.
  """

  def __init__(
      self,
      directory,
      *,
      stage: str,
      steps: int,
      start_step: int = 0,
      fingerprint: str | None = None,
      every: int = 1,
      tensorboard_dir=None,
      progress: bool = True,
  ):
    self._stage, self._steps, self._every = stage, steps, every
    self._pending: tuple[int, Any] | None = None
    self._lead = jax.process_index() == 0
    self._tokens, self._seconds = 0.0, 0.0
    self._file = self._board = self._events = self._bar = None
    self._warned = False
    path = as_path(directory) / "metrics.jsonl"
    kept, damaged = read_until(path, start_step, fingerprint)
    texts = [json.dumps(line) + "\n" for line in kept]
    self._digest = _digest(texts)
    if kept:
      self._tokens, self._seconds = kept[-1]["tokens"], kept[-1]["seconds"]
    if self._lead:
      if damaged:
        copy = fingerprints.set_aside(path, copy=True)
        _log.warning(
            "%s: %s damaged, and left out; the file is kept as %s", path, _numbers(damaged),
            copy.name,
        )
      write_atomically(path, "".join(texts))
      self._file = Appender(path)
      if tensorboard_dir is not None:
        from tensorboardX import SummaryWriter  # Slow to import, and only needed here.

        self._events = Mirror(tensorboard_dir)
        self._board = SummaryWriter(str(self._events.folder), purge_step=start_step + 1)
      if progress:
        import tqdm

        self._bar = tqdm.tqdm(
            total=steps,
            initial=start_step,
            desc=stage,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        )
    self._run_tokens, self._started = 0.0, time.monotonic()
    self._last = self._started
    self.latest: dict[str, float] = {}

  def __enter__(self):
    return self

  def __exit__(self, exc_type, *_):
    try:
      if exc_type is None:
        self.flush()
    finally:
      for resource in (self._file, self._board, self._events, self._bar):
        if resource is not None:
          resource.close()

  def fingerprint(self) -> str:
    """blake2b of the lines that process 0 has written, 16 hex digits."""
    return self._digest.hexdigest()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of `step` (1-based) and writes those of the step before."""
    self._emit()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Writes what is pending, down to the disk or the bucket, whatever `every` says.

    Called before a checkpoint, so that a resumed run finds the totals of its first step.
    """
    self._emit(due=True)
    if self._file is not None:
      self._file.sync()
    if self._board is not None:
      self._board.flush()
      self._events.sync()

  def _emit(self, due: bool = False) -> None:
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = {k: float(np.asarray(v)) for k, v in jax.device_get(dict(metrics)).items()}
    now = time.monotonic()
    self._seconds += now - self._last
    self._last = now
    trained = values.pop("tokens", 0.0)
    self._tokens += trained
    self._run_tokens += trained
    if values.pop("skipped", 0.0) or not math.isfinite(values["loss"]):
      raise Diverged(
          f"{self._stage}: the loss or gradient of step {step} is not finite "
          f"(loss {values['loss']}); the update was not applied. Lower the learning rate, or look "
          "at the batch."
      )
    empty, share = values.pop("empty", 0.0), values.get("trained_share", 1.0)
    if empty:
      values["empty"] = empty
    if (empty or share < _LEAST_SHARE) and not self._warned and self._lead:
      self._warned = True
      trained = "no token" if empty else f"{share:.1%} of the tokens"
      print(
          f"{self._stage}: step {step} trained {trained}; the others are masked: rollouts that "
          "were truncated at max_new_tokens and are left out, or rows without a response. Later "
          "steps of the kind show in metrics.jsonl only",
          file=sys.stderr,
      )
    line = {"step": step, "loss": values.pop("loss"), "tokens": self._tokens}
    line |= {"seconds": round(self._seconds, 3), **values}
    self.latest = line
    if not self._lead:
      return
    if due or step % self._every == 0 or step == self._steps:
      finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN.
      text = json.dumps(finite) + "\n"
      self._digest.update(text.encode())
      self._file.write(text)
      if self._board is not None:
        for name, value in line.items():
          if name != "step":
            self._board.add_scalar(f"{self._stage}/{name}", value, step)
    if self._bar is not None:
      rate = self._run_tokens / max(now - self._started, 1e-9)
      self._bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
      self._bar.update(step - self._bar.n)
