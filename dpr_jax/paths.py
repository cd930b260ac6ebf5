"""Paths on a disk, or in a bucket of Google Cloud Storage that all hosts reach: gs://BUCKET/...

`as_path` gives a pathlib.Path or, of a bucket, an epath.Path, which has its methods. The rest of
this file is what differs. An object of a bucket appears as a whole, so that a plain write is
atomic, but nothing can be appended to it, linked or renamed; a folder is there while something is
in it.
"""

import functools
import importlib.util
import io
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath

from dpr_jax.errors import UserError

Path = pathlib.Path | epath.Path


def in_bucket(path: str | os.PathLike) -> bool:
  return "://" in str(path)


@functools.cache
def _store() -> Any:
  """The file system of buckets, also that of epath, and so of Orbax and JAX.

  Raises:
    UserError: what it needs is not installed.
  """
  if any(importlib.util.find_spec(name) is None for name in ("gcsfs", "fsspec")):
    raise UserError("a gs:// path needs gcsfs: pip install 'dpr_jax[gcp]'")
  # Read when gcsfs is imported. Without it, every call asks what kind of bucket this is.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  import fsspec

  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs what it also raises.
  # Other hosts write here too, and what was listed before says nothing of now.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return fsspec.filesystem("gcs")


def refusal(error: OSError) -> str:
  """What the disk, or the bucket, says."""
  if error.strerror is None and isinstance(error, FileNotFoundError):
    return "there is no such bucket"
  return error.strerror or str(error)[:200]


def as_path(path: str | os.PathLike) -> Path:
  """Raises UserError for a bucket that is not one of Google's, or without what that needs."""
  if not in_bucket(path):
    return path if hasattr(path, "iterdir") else pathlib.Path(path)
  bucket = str(path).partition("gs://")[2].split("/")[0]
  if not str(path).startswith("gs://") or not bucket:
    raise UserError(f"{path}: expected a path on a disk, or gs://BUCKET/FOLDER")
  _store()
  return epath.Path(path)


def is_link(path: Path) -> bool:
  return not in_bucket(path) and path.is_symlink()


def absolute(path: str | os.PathLike) -> Path:
  """The path from the root, so that it is found from any directory."""
  return as_path(path) if in_bucket(path) else pathlib.Path(path).absolute()


def write_atomically(path: Path, content: str | bytes) -> None:
  """A reader sees the old file or the new one."""
  data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
  if in_bucket(path):
    path.write_bytes(data)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)


def modified(path: Path) -> float:
  """When a file was written, in seconds by the clock of its file system."""
  if in_bucket(path):
    return _store().info(str(path))["mtime"].timestamp()
  return path.stat().st_mtime


def rename(path: Path, to: Path) -> None:
  """Of a file or a folder. In a bucket all is copied before the first of it is deleted."""
  if not in_bucket(path):
    path.rename(to)
    return
  store, base = _store(), len(path.as_uri())
  # Orbax's mark of a finished checkpoint stands above its arrays, and goes before them.
  files = sorted((f"gs://{f}" for f in store.find(str(path))), key=lambda f: (f.count("/"), f))
  for file in files:
    store.cp_file(file, f"{to}{file[base:]}")
  for file in files:
    store.rm_file(file)


def aside(path: Path) -> str:
  """The command with which a user sets a folder aside."""
  return f"{'gcloud storage mv' if in_bucket(path) else 'mv'} {path} {path}.damaged"


def copy(path: Path, to: Path) -> None:
  """Of a file, which appears as a whole."""
  if in_bucket(path):
    _store().cp_file(str(path), str(to))
    return
  to.parent.mkdir(parents=True, exist_ok=True)
  temporary = to.with_name(to.name + ".tmp")
  shutil.copyfile(path, temporary)
  os.replace(temporary, to)


def share(folder: Path, to: Path) -> None:
  """Makes what is in a folder appear in another: by a link, in a bucket as copies of its objects.

  A second call changes nothing, but adds what the first one did not come to.
  """
  if not in_bucket(folder):
    if not is_link(to) and not to.exists() and folder.is_dir():
      to.symlink_to(os.path.relpath(folder, to.parent), target_is_directory=True)
    return
  store, base = _store(), len(folder.as_uri())
  for file in (f"gs://{f}" for f in store.find(str(folder))):
    if not store.exists(target := f"{to}{file[base:]}"):
      store.cp_file(file, target)


def upload(folder: pathlib.Path, to: Path) -> list[Path]:
  """Copies the files of a folder on this disk, each as a whole; returns where they are."""
  files = sorted(file for file in folder.rglob("*") if file.is_file())
  targets = [to / file.relative_to(folder).as_posix() for file in files]
  for file, target in zip(files, targets):
    if in_bucket(target):
      _store().put_file(str(file), str(target))
    else:
      copy(file, target)
  return targets


def on_disk(path: str | os.PathLike) -> pathlib.Path:
  """Where a file, or the files of a folder, can be read by what knows no buckets.

  That is the path itself; of a bucket a copy, in a temporary folder that lives as long as the
  process.

  Raises:
    FileNotFoundError: nothing is there, in the bucket.
  """
  if not in_bucket(path):
    return pathlib.Path(path)
  found = _store().ls(str(as_path(path)).rstrip("/"), detail=True)
  files = tuple(sorted((f["name"], str(f.get("generation"))) for f in found if f["type"] == "file"))
  return _downloaded(str(path).rstrip("/").removeprefix("gs://"), files)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="dpr_jax-")


@functools.cache
def _downloaded(name: str, files: tuple[tuple[str, str], ...]) -> pathlib.Path:
  """A copy of these generations of the files of a folder; of one file, where it is alone."""
  folder = pathlib.Path(tempfile.mkdtemp(dir=_temporary().name)) / name
  targets = [folder if file == name else folder / file.rpartition("/")[2] for file, _ in files]
  for target in targets:
    target.parent.mkdir(parents=True, exist_ok=True)
  _store().get([f"gs://{file}" for file, _ in files], [str(target) for target in targets])
  return folder


def append(path: Path, data: bytes) -> None:
  """One write, on the disk or in the bucket when it returns."""
  if in_bucket(path):
    path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
    return
  with open(path, "ab", buffering=0) as file:
    file.write(data)
    os.fsync(file.fileno())


class Mirror:
  """A folder for what knows no buckets, to write to: `folder` is the one that is given, or of a
  bucket one on this disk, whose files are copied at every `sync`. As a context it yields that path,
  and copies nothing where the block raises.
  """

  def __init__(self, folder: Path):
    self._given, self.folder, self._temporary = folder, folder, None
    if in_bucket(folder):
      self._temporary = tempfile.TemporaryDirectory(prefix="dpr_jax-")
      self.folder = pathlib.Path(self._temporary.name)

  def sync(self) -> None:
    if self._temporary:
      upload(self.folder, self._given)

  def close(self) -> None:
    self.__exit__(None)

  def __enter__(self) -> pathlib.Path:
    return self.folder

  def __exit__(self, kind: Any, *_: Any) -> None:
    if kind is None:
      self.sync()
    if self._temporary:
      self._temporary.cleanup()


class Appender:
  """Adds lines to a text file; in a bucket, which has no such thing, `sync` writes all of it."""

  def __init__(self, path: Path):
    self._path = path
    if in_bucket(path):
      self._file = io.StringIO()
      self._file.write(path.read_text(encoding="utf-8") if path.exists() else "")
    else:
      self._file = open(path, "a", encoding="utf-8", buffering=1)  # A line at a time.

  def write(self, text: str) -> None:
    self._file.write(text)

  def sync(self) -> None:
    """What was written is on the disk, or in the bucket, when this returns."""
    if in_bucket(self._path):
      self._path.write_text(self._file.getvalue(), encoding="utf-8")
    else:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if in_bucket(self._path):
      self.sync()
    self._file.close()
