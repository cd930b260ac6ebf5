"""A signal ends a process where it can go on, once, with the exit code of that signal."""

import os
import signal
import threading

import pytest

from dpr_jax import cli, signals
from dpr_jax.errors import Stopped

BOTH = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])


def test_outside_of_an_entry_point_nothing_is_handled():
  before = signal.getsignal(signal.SIGINT)
  with signals.handled():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before and signals.reached() is None


@BOTH
def test_the_first_signal_ends_work_that_defers_nothing(signum, capsys):
  done = []

  def work(argv):
    os.kill(os.getpid(), signum)
    done.append(argv)

  with pytest.raises(SystemExit) as end:
    cli.run_entry_point(work, [], kept="nothing was written")
  assert end.value.code == 128 + signum and not done
  name = signal.Signals(signum).name
  assert capsys.readouterr().err == f"stopped by {name}; nothing was written\n"


@BOTH
def test_deferred_work_is_asked_to_stop_and_later_signals_change_nothing(signum, capsys):
  units = []

  def work(argv):
    with signals.deferred():
      for unit in range(5):
        if unit == 2:
          os.kill(os.getpid(), signum)
          os.kill(os.getpid(), signal.SIGTERM)
        units.append(unit)
        if received := signals.reached():
          os.kill(os.getpid(), signal.SIGINT)  # While the unit is being saved.
          raise Stopped(received, f"sft: step {unit} is saved")

  with pytest.raises(SystemExit) as end:
    cli.run_entry_point(work, [])
  assert end.value.code == 128 + signum and units == [0, 1, 2]
  name = signal.Signals(signum).name
  assert capsys.readouterr().err == (
      f"sft: stopped by {name}; step 2 is saved; rerun the same command to resume\n"
  )


def test_a_signal_after_the_last_unit_is_not_lost():
  with pytest.raises(Stopped), signals.handled():
    with signals.deferred():
      os.kill(os.getpid(), signal.SIGTERM)


def test_an_error_of_the_work_comes_before_a_signal():
  with pytest.raises(ZeroDivisionError), signals.handled():
    with signals.deferred():
      os.kill(os.getpid(), signal.SIGTERM)
      raise ZeroDivisionError


def test_what_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with signals.handled():
      assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


def test_another_thread_than_the_main_one_handles_no_signals():
  def run():
    with signals.handled():
      pass

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
