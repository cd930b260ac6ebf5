"""Processes agree on a stop, and name the one that is lost; threads stand for processes here."""

import threading
import time

import pytest

from dpr_jax.peers import Peers


class Store:
  """The coordinator's keys and values."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._changed:
      if key in self._values and not allow_overwrite:
        raise RuntimeError("exists")
      self._values[key] = value
      self._changed.notify_all()

  def key_value_dir_get(self, prefix):
    with self._changed:
      return [(k, v) for k, v in self._values.items() if k.startswith(prefix)]

  def blocking_key_value_get(self, key, milliseconds):
    with self._changed:
      assert self._changed.wait_for(lambda: key in self._values, milliseconds / 1000)
      return self._values[key]


@pytest.fixture
def make_peers(monkeypatch):
  """make_peers(count, seconds) -> Peers that share a store; what ends them is noted in `lines`."""
  made = []

  def make(count, seconds=20.0):
    store = Store()
    monkeypatch.setattr(Peers, "_exit", lambda self, *lost: (lines.append(lost), self.end(1)))
    made.extend(Peers(store, i, count, seconds) for i in range(count))
    return made, lines

  lines = []
  yield make
  for one in made:
    one.end(0)


@pytest.mark.parametrize("late", [0, 2])
def test_all_stop_after_the_same_unit(make_peers, late):
  """Whoever gets the signal, and however far ahead of it the others are."""
  peers, lines = make_peers(3)
  stopped, ready = {}, threading.Barrier(3)

  def work(one):
    ready.wait()
    for unit in range(1, 10_000):
      time.sleep(0.001 if one.index == late else 0.002)
      if unit == 30 and one.index == 1:
        one.announce(15)
        one.announce(2)
      if signum := one.reached():
        stopped[one.index] = unit, signum
        return

  threads = [threading.Thread(target=work, args=(one,)) for one in peers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert len(stopped) == 3 and len(set(stopped.values())) == 1
  assert stopped[0][1] == 15 and stopped[0][0] > 30 and not lines


def wait_for(lines, count):
  end = time.monotonic() + 30
  while len(lines) < count and time.monotonic() < end:
    time.sleep(0.05)


def test_a_process_that_is_not_heard_of_is_named(make_peers):
  peers, lines = make_peers(3, seconds=2.0)
  time.sleep(1)  # All have reported.
  peers[2]._closed.set()  # Dead: no report any more, and no word of an end.
  wait_for(lines, 2)
  assert len(lines) == 2
  for code, line in lines:
    assert code == 1 and line.startswith("process 2 (") and "has not been heard of" in line


def test_a_process_that_ends_in_an_error_ends_the_others_with_its_code(make_peers):
  peers, lines = make_peers(3)
  peers[1].end(2, "config.data.demos: no such file")
  wait_for(lines, 2)
  assert len(lines) == 2
  for code, line in lines:
    assert code == 2 and "process 1 (" in line and line.endswith("config.data.demos: no such file")


def test_a_process_that_has_finished_is_not_missed(make_peers):
  peers, lines = make_peers(2, seconds=1.0)
  time.sleep(1)
  peers[1].end(0)
  time.sleep(3)
  assert not lines


def test_a_process_for_which_the_others_wait_is_named(make_peers):
  """It reports, but its main thread (here that of the test) does nothing and is at no barrier."""
  peers, lines = make_peers(2, seconds=2.0)
  peers[1]._main = -1  # A thread that is nowhere: no frame, hence no progress.
  with peers[0].waiting():
    found = peers[0].find_lost()
  assert found is not None and found[1].startswith("process 1 (") and "is stuck" in found[1]
