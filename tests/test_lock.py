"""One run at a time in a folder; the lock of a dead process is no obstacle."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dpr_jax import lock, paths
from dpr_jax.errors import UserError


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
  if request.param == "disk":
    return tmp_path
  return request.getfixturevalue("bucket") / f"lock_{tmp_path.name}"


def left(folder):
  return [p.name for p in folder.iterdir()] if folder.exists() else []


def held(folder):
  return json.loads((folder / lock.FILE).read_text())


def test_a_second_run_is_refused_by_host_and_process(place):
  with lock.locked(place / "a" / "b", "--workdir"):
    who = held(place / "a" / "b")
    assert who["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {who['host']}"):
      with lock.locked(place / "a" / "b", "--workdir"):
        pass
    assert held(place / "a" / "b") == who
  assert not left(place)  # Nothing was written, so nothing is left.


def test_what_was_written_stays(place):
  with lock.locked(place / "a", "--workdir"):
    (place / "a" / "file").write_text("")
  assert left(place / "a") == ["file"]


def _dead_process():
  """(process id, its start) of a process that has ended, but whose parent has not noticed."""
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
  started = lock._started(process.pid)
  process.kill()
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
  return process, started


def test_the_lock_of_a_dead_process_is_taken_over(place):
  process, started = _dead_process()
  own = lock._own()
  for change in (
      {"pid": process.pid, "started": started},  # A zombie.
      {"started": "1"},  # A live process that has got the number of the dead one.
  ):
    (place / lock.FILE).write_text(json.dumps({**own, **change}))
    with lock.locked(place, "--workdir"):
      assert held(place)["token"] != own["token"]
    assert not left(place)
  process.wait()


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"pid": 1, "host": "b", "machine": "c"})])
def test_a_lock_of_another_machine_is_stale_once_it_is_not_refreshed(
    content, place, monkeypatch
):
  monkeypatch.setattr(lock, "REFRESH", 0.02)
  monkeypatch.setattr(lock, "STALE", 0.5)
  path, ended = place / lock.FILE, threading.Event()
  refresh = lambda: paths.write_atomically(path, content) or True
  refresh()
  other = threading.Thread(target=lock._refresh, args=(refresh, path, ended))
  other.start()
  with pytest.raises(UserError, match="in use by"):
    with lock.locked(place, "--output"):
      pass
  ended.set()
  other.join()
  assert path.read_text() == content
  with lock.locked(place, "--output"):  # After a while.
    assert held(place)["pid"] == os.getpid()


def test_a_process_whose_lock_was_taken_over_ends(place, monkeypatch, capsys):
  """As after it was suspended."""
  monkeypatch.setattr(lock, "REFRESH", 0.01)
  codes, ended = [], threading.Event()
  monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
  with lock.locked(place, "--workdir"):
    other = json.dumps({**held(place), "token": "another"})
    paths.write_atomically(place / lock.FILE, other)
    assert ended.wait(10)
  assert codes[0] == 1 and "another run has taken the folder over" in capsys.readouterr().err
  assert (place / lock.FILE).read_text() == other


def test_a_lock_is_refreshed_while_it_is_held(place, monkeypatch):
  monkeypatch.setattr(lock, "REFRESH", 0.01)
  with lock.locked(place, "--workdir"):
    first, until = paths.modified(place / lock.FILE), time.monotonic() + 10
    while paths.modified(place / lock.FILE) == first:
      assert time.monotonic() < until


@pytest.mark.parametrize("content", ["", json.dumps({"pid": 1, "machine": "gone"}), None])
@pytest.mark.parametrize("place, turn", [*(("disk", i) for i in range(5)), ("bucket", 0)],
                         indirect=["place"])
def test_one_of_many_takes_a_stale_lock(content, turn, place, monkeypatch):
  """All have found it stale before the first one removes it."""
  monkeypatch.setattr(lock, "STALE", -1.0)
  if content is None:
    content = json.dumps({**lock._own(), "started": "1"})
  (place / lock.FILE).write_text(content)
  found, got, refused, leave = threading.Barrier(8), [], [], threading.Event()
  first, alive = threading.local(), lock._alive

  def alive_to_all(path, holder):
    answer = alive(path, holder)
    if not getattr(first, "past", False):
      first.past = True
      assert not answer
      found.wait(60)
    return answer

  monkeypatch.setattr(lock, "_alive", alive_to_all)

  def run():
    try:
      with lock.locked(place, "--workdir"):
        got.append(held(place)["token"])
        leave.wait(60)
        assert held(place)["token"] == got[0]
    except UserError:
      refused.append(1)
      if len(refused) == 7:
        leave.set()

  threads = [threading.Thread(target=run) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(got), len(refused)) == (1, 7)
  assert not left(place)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="--workdir=.* cannot be written: Not a directory"):
    with lock.locked(tmp_path / "file" / "run", "--workdir"):
      pass


def test_a_bucket_that_is_not_there_is_refused(bucket):
  with pytest.raises(UserError, match="--workdir=gs://other/run cannot .* no such bucket"):
    with lock.locked(paths.as_path("gs://other/run"), "--workdir"):
      pass
