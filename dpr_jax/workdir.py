"""The files of a run.

    config.json            what was run: resolved config, model, data, versions, labels
    tokenizer/             the tokenizer of the run, so that a stage can be used on its own
    sft/ dpr/ METHOD/      one folder per trained stage: checkpoints/ and metrics.jsonl
    reference.json         what was measured of the reference
    samples/               SYSTEM.jsonl, responses on the held-out prompts with their scores;
                           measures.json, what models say of them; frontier/, several responses by
                           temperature; corruption.jsonl, rewards of demonstrations with one wrong
                           token; heatmap_*.jsonl, scored tokens
    tensorboard/
    report/                report.html, results.json, PNG plots
    profile/               one folder per stage: traces of --profile_steps, if asked for
    compilation_cache/     compiled programs; may be deleted
    .lock                  who writes here, while a run goes on (see lock.py)
With several seeds, seed_N/ is a whole workdir for each, and report/ is of all of them. A sweep has
a workdir for each of its points, such as beta=0.5/, whose shared stages are links (see sweep.py).
"""

import base64
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import lock
from dpr_jax.errors import UserError
from dpr_jax.sharding import barrier

# Names in a workdir that no stage may have.
RESERVED = (
    "tokenizer", "samples", "tensorboard", "report", "profile", "compilation_cache", "base", "sft",
    "ref",
)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions() -> dict[str, str]:
  """Python and package versions, for config.json."""
  out = {"python": platform.python_version()}
  for name in _PACKAGES:
    out[name] = importlib.metadata.version(name)
  return out


def _plain(value: Any) -> Any:
  """The value as JSON has it: null for NaN and infinities, text for dates and other things.

  Bytes that are not UTF-8 become base64.
  """
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return base64.b64encode(value).decode()
  if hasattr(value, "isoformat"):
    return value.isoformat()
  return value if value is None or isinstance(value, str | int) else str(value)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes atomically, from process 0 only: a reader sees the old file or the new one."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
  temporary.write_text(text + "\n", encoding="utf-8")
  os.replace(temporary, path)


def write_lines(path: pathlib.Path, records: list[Mapping[str, Any]]) -> None:
  """Writes JSON lines, atomically, from process 0 only."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    for record in records:
      file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
  os.replace(temporary, path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file]


class Workdir:
  """Paths of a run, and its config.json."""

  def __init__(self, path: str | os.PathLike):
    if "://" in str(path):
      raise UserError(f"--workdir={path}: a bucket must be mounted as a folder that all hosts see, "
                      "for example with gcsfuse; give its path")
    self.path = pathlib.Path(path).absolute()
    self.config_file = self.path / "config.json"
    self.tokenizer = self.path / "tokenizer"
    self.reference_file = self.path / "reference.json"
    self.samples = self.path / "samples"
    self.measures_file = self.samples / "measures.json"
    self.corruption_file = self.samples / "corruption.jsonl"
    self.frontier = self.samples / "frontier"
    self.tensorboard = self.path / "tensorboard"
    self.report = self.path / "report"
    self.profile = self.path / "profile"
    self.compilations = self.path / "compilation_cache"

  def stage(self, name: str) -> pathlib.Path:
    return self.path / name

  def system_file(self, name: str) -> pathlib.Path:
    return self.samples / f"{name}.jsonl"

  def read_config(self) -> dict[str, Any]:
    try:
      return json.loads(self.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
      raise UserError(f"{self.config_file}: not the config.json of a run: {e}") from None

  def check(self, config: config_lib.RunConfig) -> None:
    """Refuses a folder that holds something else: another config, or files of no run.

    Raises:
      UserError: naming the first field that differs.
    """
    if not self.path.exists():
      return
    if not self.path.is_dir():
      raise UserError(f"--workdir={self.path} is a file; it must be a folder, or not exist yet")
    if not self.config_file.exists():
      # Written before config.json, by a run that was killed in between.
      ours = {self.compilations.name, self.config_file.name + ".tmp"}
      foreign = sorted(
          p.name for p in self.path.iterdir()
          if p.name not in ours and not p.name.startswith(lock.FILE)
      )
      if foreign:
        raise UserError(
            f"--workdir={self.path} holds files but no config.json of a run ({foreign[0]}, ...); "
            "use a new folder"
        )
      return
    found = config_lib.first_difference(
        self.read_config().get("config", {}), config_lib.to_json(config)
    )
    if found:
      raise UserError(
          f"--workdir={self.path} belongs to a run with another config ({found}); use a new "
          "folder, or rerun with that config to resume; --resume_with_changes takes another "
          "optimizer"
      )

  def claim(self, config: config_lib.RunConfig, **facts: Any) -> None:
    """Writes config.json; call `check` first. A resumed run must find the same data.

    Raises:
      UserError: the demonstrations file has changed since the run began.
    """
    barrier("claim")  # No process is still checking a folder that the first one writes to.
    if self.config_file.exists():
      before = self.read_config()
      facts |= {name: before[name] for name in ("changes",) if name in before}
      old = before.get("data", {}).get("blake2b")
      new = facts.get("data", {}).get("blake2b")
      if old != new:
        raise UserError(
            f"config.data.demos={config.data.demos}: the file has changed since the run in "
            f"--workdir={self.path} began ({old} there, {new} now); use a new folder"
        )
    record = {"config": config_lib.to_json(config), "seed": config.seed, "versions": versions()}
    try:
      write_json(self.config_file, {**record, **facts})
    except OSError as e:
      raise UserError(f"--workdir={self.path} cannot be written: {e.strerror}") from None
