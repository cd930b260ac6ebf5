"""Processes that were given different things end with one error each, which names the difference.

Threads stand for processes: each has the index and the board that a process would have.
"""

import threading

import pytest

from dpr_jax import agreement
from dpr_jax.errors import UserError


class Service:
  """The key-value store of a coordination service."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      assert key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
        raise agreement.jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
      return self._values[key]


@pytest.fixture
def in_processes(monkeypatch):
  """in_processes(f, n) -> what f(i) returned or raised in each of n processes."""

  def run(function, n):
    here, service, out = threading.local(), Service(), [None] * n

    class State:
      client = service
      num_processes = n
      process_id = property(lambda _: here.index)

    class Rounds:
      def __next__(self):
        here.rounds = getattr(here, "rounds", -1) + 1
        return here.rounds

    def work(i):
      here.index = i
      try:
        out[i] = function(i)
      except BaseException as e:
        out[i] = e

    monkeypatch.setattr(agreement.distributed, "global_state", State())
    monkeypatch.setattr(agreement, "_rounds", Rounds())
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(20)
      assert not thread.is_alive()
    return out

  return run


def errors(found):
  assert all(isinstance(e, UserError) for e in found), found
  return [str(e) for e in found]


def test_one_process_compares_nothing():
  assert agreement.agree(lambda: 3, lambda value: 1 / 0) == 3


def test_equal_facts_go_on(in_processes):
  facts = lambda value: {"config": {"seed": 0, "steps": (1, 2), "none": None}, "empty": {}}
  assert in_processes(lambda i: agreement.agree(lambda: i, facts), 3) == [0, 1, 2]


@pytest.mark.parametrize("process", [0, 2])
@pytest.mark.parametrize("name, other", [("config.sft.lr", {"sft": {"lr": 2.0}, "x": 1}),
                                         ("config.y", {"sft": {"lr": 1.0}, "x": 1, "y": None})])
def test_what_differs_is_named_everywhere(in_processes, process, name, other):
  usual = {"sft": {"lr": 1.0}, "x": 1}
  facts = lambda i: {"config": other if i == process else usual}
  found = errors(in_processes(lambda i: agreement.agree(lambda: i, facts), 3))
  assert len(set(found)) == 1 and found[0].startswith(f"{name}: ")
  assert f"in process {process or 1}, " in found[0] and "in process 0;" in found[0]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("error", [UserError("config.data: no such file"), KeyError("bug")])
def test_an_error_of_one_process_ends_all(in_processes, process, error):
  def make(i):
    if i == process:
      raise error
    return i

  found = in_processes(lambda i: agreement.agree(lambda: make(i), lambda _: {"seed": 0}), 3)
  assert found[process] is error
  others = errors(found[:process] + found[process + 1 :])
  assert all(e.startswith(f"process {process}: ") and str(error) in e for e in others)


def test_a_process_that_does_not_come_is_named(in_processes):
  late = lambda i: i if i == 1 else agreement.agree(lambda: i, seconds=0.3)
  found = in_processes(late, 3)
  for error in errors([found[0], found[2]]):
    assert "process 1 has not come as far as process 0" in error


def test_a_folder_that_hosts_do_not_share_is_refused(in_processes, tmp_path):
  shared = tmp_path / "host0" / "run"
  shared.mkdir(parents=True)
  assert in_processes(lambda i: agreement.check_shared(shared, "--workdir=run"), 2) == [None, None]
  stale = tmp_path / "host1" / "run"
  for files in ({}, {agreement.PROBE: "of another run"}):
    stale.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
      (stale / name).write_text(text)
    found = errors(in_processes(
        lambda i: agreement.check_shared(tmp_path / f"host{i}" / "run", "--workdir=run"), 2))
    assert all("--workdir=run" in e and "process 1" in found[0] for e in found)
    assert list(shared.iterdir()) == []  # Nothing is left.
