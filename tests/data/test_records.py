"""Files and folders that records come from."""

import gzip
import json

import pytest

from dpr_jax.data.dataset import fingerprint
from dpr_jax.data.records import iter_records
from dpr_jax.errors import UserError

ROWS = [{"prompt": "Who?", "response": "é"}, {"prompt": "Why?", "response": "r"}]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS).encode()


def rows(path):
  return [record for record, _ in iter_records(path)]


@pytest.mark.parametrize("name, content", [
  ("d.ndjson", LINES), ("D.JSONL", LINES), ("d.Json", json.dumps(ROWS).encode()),
  ("d.jsonl.gz", gzip.compress(LINES, mtime=0)),
  ("d.JSON.GZ", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
])
def test_suffixes(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert rows(tmp_path / name) == ROWS


@pytest.mark.parametrize("name, content, pattern", [
  ("d.jsonl.gz", b"no gzip", "not a readable gzip file"),
  ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "not a readable gzip file"),
  ("d.gz", gzip.compress(LINES, mtime=0), "unknown suffix '.gz'"),
  ("d.jsonl", b"[" * 100_000, "d.jsonl: JSON nested deeper"),
  ("d.jsonl", b'{"a": ' + b"9" * 10_000 + b"}", "d.jsonl:1: an integer of thousands of digits"),
])
def test_files_that_cannot_be_read(tmp_path, name, content, pattern):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=pattern):
    rows(tmp_path / name)


def test_a_name_that_is_too_long_is_no_file():
  with pytest.raises(UserError, match="^x{300}: no such file"):
    rows("x" * 5000)


def test_a_folder_of_files(tmp_path):
  (tmp_path / "b.jsonl").write_bytes(LINES)
  (tmp_path / "README.md").write_text("no data")
  with gzip.open(tmp_path / "a.json.gz", "wb") as file:
    file.write(json.dumps(ROWS[:1]).encode())
  found = list(iter_records(tmp_path))
  assert [r for r, _ in found] == [ROWS[0], *ROWS]  # in the order of names
  assert [s for _, s in found] == [f"{tmp_path}/a.json.gz[0]", f"{tmp_path}/b.jsonl:1",
                                   f"{tmp_path}/b.jsonl:2"]
  before = fingerprint(tmp_path)
  (tmp_path / "README.md").write_text("still none")
  assert fingerprint(tmp_path) == before
  (tmp_path / "b.jsonl").write_bytes(LINES + LINES)
  assert fingerprint(tmp_path) != before
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="the folder holds no data file; expected .jsonl"):
    rows(tmp_path / "empty")
  (tmp_path / "train-0.jsonl").write_bytes(LINES)
  (tmp_path / "test.jsonl").write_bytes(LINES)
  with pytest.raises(UserError, match=r"several splits \(test, train\); name one"):
    rows(tmp_path)


def test_a_folder_of_the_datasets_library(tmp_path):
  """As save_to_disk writes it: Arrow streams, and JSON that is no data."""
  pa = pytest.importorskip("pyarrow")
  import pyarrow.ipc  # noqa: F401

  split = tmp_path / "train"
  split.mkdir()
  for i, row in enumerate(ROWS):
    table = pa.Table.from_pylist([row])
    with pa.OSFile(str(split / f"data-{i:05d}-of-00002.arrow"), "wb") as file:
      make = pa.ipc.new_stream if i else pa.ipc.new_file  # Both kinds of Arrow file.
      with make(file, table.schema) as writer:
        writer.write_table(table)
  for name in ("state.json", "dataset_info.json"):
    (split / name).write_text("{}")
  assert rows(split) == ROWS
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
  assert rows(tmp_path) == ROWS
  (tmp_path / "test").mkdir()
  with pytest.raises(UserError, match="holds the splits test, train; name the folder of one"):
    rows(tmp_path)
  (split / "data-00000-of-00002.arrow").write_bytes(b"ARROW1 and no more")
  with pytest.raises(UserError, match="data-00000-of-00002.arrow: not a readable Arrow file"):
    rows(split)
