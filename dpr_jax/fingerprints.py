"""Fingerprints of files and records, and what is done with a file that is not what was written.

A damaged file is never deleted: it is renamed, so that its place is free and nothing is lost.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from dpr_jax import paths

CHECKSUM = "checksum"  # the key of a sealed record.


def of_bytes(data: bytes) -> str:
  """blake2b, 16 hex digits."""
  return hashlib.blake2b(data, digest_size=8).hexdigest()


def of_file(path: str | os.PathLike) -> str:
  """blake2b of a file's content, 16 hex digits; read once per version of the file on this disk."""
  if paths.in_bucket(path):
    return of_bytes(paths.as_path(path).read_bytes())
  stat = os.stat(path)
  return _of_version(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _of_version(path: str, *_: int) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def of_files(paths: Iterable[pathlib.Path]) -> dict[str, str]:
  """Name -> fingerprint of files, several at a time: the shards of a large model."""
  paths = sorted(paths)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip((p.name for p in paths), pool.map(of_file, paths)))


def _of_record(record: Mapping[str, Any]) -> str:
  return of_bytes(json.dumps(record, sort_keys=True).encode())


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
  """A JSON object with its own checksum."""
  return {**record, CHECKSUM: _of_record(record)}


def is_whole(record: Any) -> bool:
  """Whether a JSON value is a sealed object as it was sealed."""
  if not isinstance(record, dict) or CHECKSUM not in record:
    return False
  return record[CHECKSUM] == _of_record({k: v for k, v in record.items() if k != CHECKSUM})


def set_aside(path: paths.Path, suffix: str = "damaged", copy: bool = False) -> paths.Path:
  """Renames (or copies) a file or folder to the first free one of PATH.damaged, PATH.damaged2...
  """
  number = 1
  while (to := path.with_name(f"{path.name}.{suffix}{number if number > 1 else ''}")).exists():
    number += 1
  (paths.copy if copy else paths.rename)(path, to)
  return to
