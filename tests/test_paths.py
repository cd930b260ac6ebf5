"""What differs between a disk and a bucket has the same results on both."""

import importlib.util

import pytest

from dpr_jax import paths
from dpr_jax.errors import UserError


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
  """A folder that is not there yet."""
  if request.param == "disk":
    return tmp_path / "folder"
  return request.getfixturevalue("bucket") / f"paths_{tmp_path.name}"


def tree(folder):
  """Path in the folder -> content, of all files below it."""
  found = {}
  for path in folder.iterdir():
    if path.is_dir():
      found |= {f"{path.name}/{name}": text for name, text in tree(path).items()}
    else:
      found[path.name] = path.read_text()
  return found


def test_files_and_folders_are_written_copied_and_renamed(folder):
  paths.write_atomically(folder / "a" / "x.json", "é")
  paths.write_atomically(folder / "a" / "b" / "y.json", b"old")
  paths.write_atomically(folder / "a" / "b" / "y.json", b"new")
  paths.copy(folder / "a" / "x.json", folder / "copy.json")
  paths.rename(folder / "a" / "x.json", folder / "a" / "z.json")
  assert tree(folder) == {"a/z.json": "é", "a/b/y.json": "new", "copy.json": "é"}
  paths.rename(folder / "a", folder / "c")
  assert tree(folder) == {"c/z.json": "é", "c/b/y.json": "new", "copy.json": "é"}
  assert not (folder / "a").exists()


def test_what_is_shared_appears_elsewhere_once(folder):
  paths.write_atomically(folder / "a" / "x", "1")
  paths.share(folder / "a", folder / "b")
  paths.share(folder / "a", folder / "b")
  paths.share(folder / "none", folder / "c")
  assert tree(folder) == {"a/x": "1", "b/x": "1"}
  assert paths.is_link(folder / "b") != paths.in_bucket(folder)


def test_lines_are_there_once_they_are_synced(folder):
  folder.mkdir(exist_ok=True)
  paths.append(folder / "log", b"1\n")
  file = paths.Appender(folder / "log")
  file.write("2\n")
  file.sync()
  assert (folder / "log").read_text() == "1\n2\n"
  file.write("3\n")
  file.close()
  paths.append(folder / "log", b"4\n")
  assert (folder / "log").read_text() == "1\n2\n3\n4\n"


def test_what_knows_no_buckets_reads_and_writes_on_the_disk(folder):
  with paths.Mirror(folder) as place:
    (place / "sub").mkdir(parents=True)
    for name in ("model", "sub/deep"):
      (place / name).write_text("1")
  assert tree(folder) == {"model": "1", "sub/deep": "1"}
  for text in ("1", "2"):  # A copy of what is there now.
    (folder / "model").write_text(text)
    assert (paths.on_disk(folder) / "model").read_text() == text
    assert paths.on_disk(folder / "model").read_text() == text


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://", "https://example.org/run"])
def test_other_places_are_refused(path):
  with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
    paths.as_path(path)


def test_a_bucket_needs_an_extra(monkeypatch):
  paths._store.cache_clear()
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'dpr_jax\[gcp\]'"):
    paths.as_path("gs://bucket/run")
