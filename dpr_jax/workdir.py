"""The files of a run.

    config.json            what was run: resolved config, model, data, versions, labels, inputs;
                           .config.json is its copy
    checksums.json         fingerprints of the finished files below
    tokenizer/             the tokenizer of the run with its chat template, which resumed runs and
                           whatever uses a stage read
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
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dpr_jax import config as config_lib
from dpr_jax import fingerprints, lock, weights
from dpr_jax.agreement import PROBE, agree
from dpr_jax.errors import UserError
from dpr_jax.paths import Path, absolute, aside, on_disk, refusal, write_atomically
from dpr_jax.sharding import barrier

# Names in a workdir that no stage may have.
RESERVED = (
    "tokenizer", "samples", "tensorboard", "report", "profile", "compilation_cache", "base", "sft",
    "ref",
)

_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions(*more: str) -> dict[str, str]:
  """Python and package versions, for config.json; also those of `more` distributions."""
  out = {"python": platform.python_version()}
  for name in (*_PACKAGES, *more):
    out[name] = importlib.metadata.version(name)
  return out


def code_fingerprint() -> str:
  """blake2b of the package's source files, 16 hex digits."""
  root = pathlib.Path(__file__).parent
  digest = hashlib.blake2b(digest_size=8)
  for path in sorted(root.rglob("*.py")):
    digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()


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


def write_json(path: Path, value: Any) -> None:
  """Writes atomically, from process 0 only: a reader sees the old file or the new one."""
  if jax.process_index() == 0:
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def write_lines(path: Path, records: list[Mapping[str, Any]]) -> None:
  """Writes JSON lines, atomically, from process 0 only."""
  if jax.process_index() == 0:
    lines = (json.dumps(_plain(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    write_atomically(path, "".join(lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
  with path.open(encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def check_path(path: Any) -> None:
  """Raises UserError where Orbax would take a path for a pattern: it saves, but reads nothing back.
  """
  if found := re.search(r"[*?\[\]\\]", str(path)):
    raise UserError(f"{path}: checkpoints cannot be written to a path with any of * ? [ ] \\ "
                    f"({found[0]!r} here); use another folder")


def _is_json(path: Path) -> bool:
  """Whether a file is JSON, or JSON lines, and not empty."""
  try:
    text = path.read_text(encoding="utf-8")
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
      json.loads(part)
  except (ValueError, RecursionError):
    return False
  return text.endswith("\n")


def _is_sealed(path: Path) -> bool:
  try:
    return fingerprints.is_whole(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, RecursionError):
    return False


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  """Raises UserError where a file is not what `Workdir.write_config` writes."""
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f"{path}: not the config.json of a run: {e}") from None
  if not isinstance(record, dict):
    raise UserError(f"{path}: not the config.json of a run: no JSON object")
  if fingerprints.CHECKSUM in record and not fingerprints.is_whole(record):
    raise UserError(f"{path}: not what the run wrote; restore it from a copy")
  return record


class Workdir:
  """Paths of a run, and its config.json."""

  def __init__(self, path: str | os.PathLike):
    self.path = absolute(path)
    self.config_file = self.path / "config.json"
    self._config_copy = self.path / ".config.json"
    self.checksums_file = self.path / "checksums.json"
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

  def stage(self, name: str) -> Path:
    return self.path / name

  def system_file(self, name: str) -> Path:
    return self.samples / f"{name}.jsonl"

  # --- Finished files ----------------------------------------------------------------------------

  def _checksums(self) -> dict[str, str]:
    """Path in the workdir -> fingerprint of each file that is finished; {} if it is damaged."""
    try:
      record = json.loads(self.checksums_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
      return {}
    return record["files"] if fingerprints.is_whole(record) else {}

  def record(self, *paths: Path, finished: bool = True) -> None:
    """Records, from process 0, that files are finished, or else that they are written again."""
    if jax.process_index():
      return
    old = self._checksums()
    names = {str(path.relative_to(self.path)): path for path in paths}
    new = {name: value for name, value in old.items() if name not in names}
    if finished:
      new |= {n: fingerprints.of_file(path) for n, path in names.items() if path.exists()}
    if new != old:
      write_json(self.checksums_file, fingerprints.seal({"files": new}))

  def write(self, path: Path, records: list[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Writes JSON, or JSON lines of a list, and records that the file is finished."""
    self.record(path, finished=False)
    (write_lines if isinstance(records, list) else write_json)(path, records)
    self.record(path)

  def _changed(self, folder: str = "") -> Iterator[tuple[Path, str]]:
    """Finished files that are not what was written, of one folder or of all."""
    known = self._checksums()
    for name, value in known.items():
      path = self.path / name
      if not name.startswith(folder):
        continue
      if path.exists() and fingerprints.of_file(path) != value:
        yield path, "it is not what the run wrote"
      elif not path.exists() and (path.parent == self.tokenizer or path.name == "metrics.jsonl"):
        yield path, "it is missing"
    if folder:
      return
    # Written, but not recorded: by a run that was killed in between, or by an older version.
    outputs = [self.reference_file, *self.samples.glob("*.json*"),
               *self.frontier.glob("*.json*"), *self.path.glob("*/stopped.json")]
    for path in outputs:
      if path.is_file() and path.suffix in (".json", ".jsonl"):
        if str(path.relative_to(self.path)) not in known and not _is_json(path):
          yield path, "it is not JSON"
    if self.checksums_file.exists() and not known and not _is_sealed(self.checksums_file):
      yield self.checksums_file, "it is not what the run wrote"

  def load_tokenizer(self) -> Any:
    """The tokenizer of the run, as it was written.

    Raises:
      UserError: a file of it was changed or is missing.
    """
    for path, why in self._changed(f"{self.tokenizer.name}/"):
      raise UserError(f"{path}: {why}; restore it from a copy, or run the command of the run "
                      "(python -m dpr_jax.main) again, which makes it again")
    return weights.load_tokenizer(on_disk(self.tokenizer))

  def has_tokenizer(self) -> bool:
    """Whether the run has copied its tokenizer."""
    files = (self.tokenizer / "tokenizer.json", self.tokenizer / "tokenizer_config.json")
    if not all(f.is_file() for f in (*files, self.config_file)):
      return False
    return bool(self.read_config().get("inputs"))

  def _damaged(self) -> list[tuple[Path, str]]:
    """Files to set aside, and why; raises as `set_aside_damaged`."""
    try:
      found = list(self._changed())
    except OSError as e:
      raise UserError(f"{e.filename or self.path}: cannot be read ({refusal(e)}); nothing was "
                      "changed") from None
    for path, why in found:
      stage = path.parent / "checkpoints"
      if path.name == "metrics.jsonl" and stage.exists():  # Else it is trained again.
        raise UserError(
            f"{path}: {why}; restore it from a copy, or train the stage again: {aside(stage)} "
            "and run the same command"
        )
    return found

  def set_aside_damaged(self) -> None:
    """Renames finished files that were emptied, cut or edited, so that they are made again.

    Raises:
      UserError: the metrics of a finished stage are damaged, which only training makes again; or a
        file cannot be read.
    """
    found = agree(self._damaged, seconds=600.0)
    for path, why in found if jax.process_index() == 0 else ():
      path = self.tokenizer if path.parent == self.tokenizer else path
      if path.exists() and path.name != "metrics.jsonl":
        to = fingerprints.set_aside(path)
        _log.warning("%s: %s; renamed to %s, and made again", path, why, to.name)
    barrier("set aside")

  # --- config.json -------------------------------------------------------------------------------

  def read_config(self) -> dict[str, Any]:
    """Raises UserError where it is not what a run writes; restore it from a copy then."""
    try:
      record = _read_config(self.config_file)
    except UserError as damaged:
      if not self._config_copy.exists():
        raise
      record = _read_config(self._config_copy)
      _log.warning("%s; its copy %s is read", damaged, self._config_copy.name)
    return {name: value for name, value in record.items() if name != fingerprints.CHECKSUM}

  def write_config(self, record: Mapping[str, Any]) -> None:
    """Writes config.json, with a checksum, and its copy; one that is damaged is set aside."""
    if self.config_file.exists() and jax.process_index() == 0:
      try:
        _read_config(self.config_file)
      except UserError:
        fingerprints.set_aside(self.config_file)
    for path in (self.config_file, self._config_copy):
      write_json(path, fingerprints.seal(_plain(record)))

  def check(self, config: config_lib.RunConfig) -> None:
    """Refuses a folder that holds something else: another config, or files of no run.

    Raises:
      UserError: naming the first field that differs.
    """
    check_path(self.path)
    try:
      if not self.path.exists():
        return
    except OSError as e:
      raise UserError(f"--workdir={self.path} cannot be read: {refusal(e)}") from None
    if not self.path.is_dir():
      raise UserError(f"--workdir={self.path} is a file; it must be a folder, or not exist yet")
    if not self.config_file.exists():
      # Written before config.json, by a run that was killed in between.
      ours = {self.compilations.name, self.config_file.name + ".tmp", PROBE}
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
    """Writes config.json; call `check` first. A resumed run must find the same inputs.

    Args:
      facts: `inputs` are fingerprints by what they are of, for messages: a str, or one per file.

    Its "versions" are those of now; its "history" has those of every part of the run, in order.

    Raises:
      UserError: the demonstrations, the weights, the tokenizer or a template have changed since
        the run began, or give other tokens.
    """
    barrier("claim")  # No process is still checking a folder that the first one writes to.
    now, past = versions(), []
    if self.config_file.exists():
      before = self.read_config()
      past = before.get("history") or [before.get("versions", now)]
      facts |= {name: before[name] for name in ("changes",) if name in before}
      check_inputs(before, facts, f"--workdir={self.path}")
    record = {"config": config_lib.to_json(config), "seed": config.seed, "versions": now,
              "history": past if past[-1:] == [now] else [*past, now]}
    try:
      self.write_config({**record, **facts})
    except OSError as e:
      raise UserError(f"--workdir={self.path} cannot be written: {refusal(e)}") from None


def check_inputs(record: Mapping[str, Any], facts: Mapping[str, Any], where: str) -> None:
  """Raises UserError where inputs differ from those in the config.json of the run at `where`."""
  then = {"config.data.demos": record.get("data", {}).get("blake2b"), **record.get("inputs", {})}
  now = {"config.data.demos": facts.get("data", {}).get("blake2b"), **facts.get("inputs", {})}
  for name in now:
    old, new = then.get(name, now[name]), now[name]
    if old == new:
      continue
    if name == "config.data":
      raise UserError(
          f"config.data: the same files give other tokens than when the run in {where} began "
          f"({old} there, {new} now): its template depends on something else, or another version "
          "of a package is installed; use that, or a new folder"
      )
    if isinstance(old, dict) and isinstance(new, dict):
      file = min(f for f in {*old, *new} if old.get(f) != new.get(f))
      name, old, new = f"{name}: {file}", old.get(file), new.get(file)
    raise UserError(
        f"{name}: the file has changed since the run in {where} began ({old} there, {new} now); "
        "restore it, or use a new folder"
    )
