"""Files -> records: one mapping each, with the place it came from.

JSON lines, JSON lists, Parquet and Arrow, gzipped or not, one file or a folder of them.
"""

import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dpr_jax.data.limits import parse_json
from dpr_jax.errors import UserError
from dpr_jax.paths import as_path, on_disk

JSON, TABLES = (".jsonl", ".json", ".ndjson"), (".parquet", ".arrow")
EXPECTED = "expected .jsonl, .json, .ndjson (or one of them with .gz), .parquet or .arrow"
# What the `datasets` library writes beside the rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")
_SPLIT = re.compile(r"(train|test|valid(?:ation)?|dev|eval)(?![a-z])", re.IGNORECASE)


def kind_of(value: Any) -> str:
  """What a JSON value is, in words."""
  names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
  return names.get(type(value), "a number")


def _suffix(path: pathlib.Path) -> str:
  """The suffix that says what a file holds, in lower case and without ".gz"; "" for none known."""
  name = path.name.lower()
  plain = name.removesuffix(".gz")
  known = JSON if plain != name else (*JSON, *TABLES)
  return next((suffix for suffix in known if plain.endswith(suffix)), "")


def data_files(path: str | pathlib.Path) -> list[pathlib.Path]:
  """The files that hold the records of `path`: itself, or those of a folder by name.

  Raises:
    UserError: there is none, or the folder holds several splits.
  """
  path = as_path(path)
  try:
    is_file, is_folder = path.is_file(), path.is_dir()
  except (OSError, ValueError):  # A name that is too long, or has a NUL.
    is_file = is_folder = False
  if is_file:
    if not _suffix(path):
      raise UserError(f"{path}: unknown suffix {path.suffix!r}; {EXPECTED}")
    return [path]
  if not is_folder:
    raise UserError(f"{str(path)[:300]}: no such file; {EXPECTED}, or a folder of such files")
  if (path / "dataset_dict.json").is_file():
    splits = sorted(p.name for p in path.iterdir() if p.is_dir())
    if len(splits) == 1:
      return data_files(path / splits[0])
    raise UserError(f"{path}: holds the splits {', '.join(splits)}; name the folder of one")
  files = sorted(
      p for p in path.iterdir() if p.is_file() and _suffix(p) and p.name not in _METADATA
  )
  if not files:
    raise UserError(f"{path}: the folder holds no data file; {EXPECTED}")
  splits = {found[1].lower() for p in files if (found := _SPLIT.match(p.name))}
  if len(splits) > 1:
    raise UserError(f"{path}: the folder holds files of several splits ({', '.join(sorted(splits))}"
                    "); name one file, or a folder of one split")
  return files


def iter_records(path: str | pathlib.Path) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (record, source) of a file, or of the files of a folder.

  JSON lines and JSON lists are told apart by their content. A source is FILE:LINE for JSON lines,
  FILE[INDEX] for the others.

  Raises:
    UserError: no such file, unknown suffix, empty, not UTF-8, malformed, or an item that is not an
      object.
  """
  for file in data_files(path):
    empty = True
    for record, source in (_iter_json if _suffix(file) in JSON else _iter_table)(file):
      empty = False
      if not isinstance(record, dict):
        raise UserError(f"{source}: expected a JSON object, got {kind_of(record)}")
      yield record, source
    if empty:
      raise UserError(f"{file}: empty file; expected at least one record")


def _read_text(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
      data = gzip.decompress(data)
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise UserError(f"{path}: not UTF-8 text (byte {e.start}); expected JSON") from None
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise UserError(f"{path}: not a readable gzip file: {e}") from None


def _parse(text: str, path: pathlib.Path, line: int | None = None, expected: str = "") -> Any:
  """The value of a line of a file, or of the whole file."""
  try:
    return parse_json(text, str(path) if line is None else f"{path}:{line}")
  except json.JSONDecodeError as e:
    raise UserError(f"{path}:{line or e.lineno}: malformed JSON at column {e.colno}: "
                    f"{e.msg}{expected}") from None


def _iter_json(path: pathlib.Path) -> Iterator[tuple[Any, str]]:
  text = _read_text(path)
  if text.lstrip()[:1] == "[":
    records = _parse(text, path)
    yield from ((record, f"{path}[{i}]") for i, record in enumerate(records))
    return
  expected = "; expected one JSON object a line, or one JSON list"
  # Not splitlines(): it also breaks at U+2028 and friends, which JSON strings may hold raw.
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      yield _parse(line, path, number, expected), f"{path}:{number}"


def _iter_table(path: pathlib.Path) -> Iterator[tuple[Any, str]]:
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError:
    raise UserError(f"{path}: Parquet and Arrow need pyarrow: pip install -e '.[parquet]'"
                    ) from None

  def batches() -> Iterator[Any]:
    local = on_disk(path)
    if _suffix(path) == ".parquet":
      yield from pyarrow.parquet.ParquetFile(local).iter_batches(batch_size=4096)
      return
    with pyarrow.OSFile(str(local)) as file:  # A stream is what `datasets` writes.
      if file.read(6) == b"ARROW1":
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
      else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)

  index = 0
  try:
    for batch in batches():
      for record in batch.to_pylist():
        yield record, f"{path}[{index}]"
        index += 1
  except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as e:
    # A damaged page, text that is not UTF-8, or a date that Python does not have.
    kind = _suffix(path).removeprefix(".").capitalize()
    raise UserError(f"{path}: not a readable {kind} file: {e}") from None
