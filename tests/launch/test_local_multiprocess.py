"""launch/local_multiprocess.sh: real processes, real signals."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "local_multiprocess.sh"
JAX_ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

# Both processes see the devices of both, and a sum over all devices crosses the border.
PSUM = """
from dpr_jax import distributed
distributed.initialize()
distributed.initialize()
import jax, numpy as np
from dpr_jax.sharding import make_mesh, place, to_host
assert jax.process_count() == 2 and jax.device_count() == 4 and jax.local_device_count() == 2
mesh = make_mesh()
x = place(np.arange(4.0).reshape(4, 1), mesh)
assert x.shape == (4, 1) and not x.is_fully_addressable
total = jax.jit(jax.shard_map(
  lambda a: jax.lax.psum(a, "fsdp"), mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P()))(x)
print("process", jax.process_index(), "total", float(to_host(total)[0, 0]), to_host(x).ravel())
"""

# Process 1 fails after the start; process 0 catches SIGTERM, as JAX's preemption service does.
FAIL = """
from dpr_jax import distributed
distributed.initialize()
import jax, sys, time
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("start")
print("started", flush=True)
if jax.process_index() == 1:
  import os
  os._exit(7)
time.sleep(600)
"""


def launch(n, *command, env=None, **kwargs):
  return subprocess.run(
    [SCRIPT, str(n), "--", *command], capture_output=True, text=True, timeout=120,
    env={**JAX_ENV, **(env or {})}, **kwargs)


def by_process(stdout: str) -> dict[int, list[str]]:
  found = {}
  for line in stdout.splitlines():
    index, text = re.fullmatch(r"\[(\d+)\] (.*)", line).groups()
    found.setdefault(int(index), []).append(text)
  return found


def alive(token: str) -> list[int]:
  """Processes that carry `token` in their environment."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
      if token.encode() in path.read_bytes():
        found.append(int(path.parent.name))
    except OSError:
      pass
  return found


def test_a_sum_across_processes():
  done = launch(2, sys.executable, "-c", PSUM,
                env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
  assert done.returncode == 0, done.stdout + done.stderr
  lines = by_process(done.stdout)
  for i in range(2):
    assert f"process {i} total 6.0 [0. 1. 2. 3.]" in lines[i]


def test_environment_output_and_arguments():
  code = ("import os, sys; print(os.environ['DPR_PROCESS_ID'], os.environ['DPR_NUM_PROCESSES'], "
          "os.environ['DPR_COORDINATOR'], os.environ['JAX_PLATFORMS'], sys.argv[1:]); "
          "print('to stderr', file=sys.stderr); sys.stdout.write('no newline')")
  done = launch(3, sys.executable, "-u", "-c", code, "a b", "$HOME", "")
  assert done.returncode == 0 and done.stderr == ""
  lines = by_process(done.stdout)
  assert sorted(lines) == [0, 1, 2]
  ports = set()
  for i in range(3):
    head, error, tail = lines[i]
    index, count, address, platform, arguments = head.split(" ", 4)
    assert (index, count, platform) == (str(i), "3", "cpu")
    assert arguments == "['a b', '$HOME', '']"
    host, port = address.split(":")
    assert host == "127.0.0.1"
    ports.add(port)
    assert (error, tail) == ("to stderr", "no newline")
  assert len(ports) == 1


def test_long_lines_of_several_processes_do_not_mix():
  code = "import os; c = os.environ['DPR_PROCESS_ID']\nfor _ in range(10): print(c * 50_000)"
  done = launch(4, sys.executable, "-c", code)
  assert done.returncode == 0
  lines = by_process(done.stdout)
  for i in range(4):
    assert lines[i] == [str(i) * 50_000] * 10


def test_failure_ends_the_others_and_gives_the_code(tmp_path):
  token = f"DPR_TEST_TOKEN={tmp_path.name}.{os.getpid()}"
  start = time.monotonic()
  done = launch(3, "bash", "-c", "if ((DPR_PROCESS_ID == 1)); then exit 7; fi; sleep 300 & wait",
                env=dict([token.split("=")]))
  assert done.returncode == 7
  assert "process 1 exited with 7; ending the others" in done.stderr
  assert time.monotonic() - start < 60
  assert alive(token) == []


def test_failure_of_a_jax_process_that_others_wait_for(tmp_path):
  token = f"DPR_TEST_TOKEN={tmp_path.name}.{os.getpid()}"
  done = launch(2, sys.executable, "-c", FAIL,
                env={"DPR_GRACE_SECONDS": "1", **dict([token.split("=")])})
  assert done.returncode == 7, done.stdout + done.stderr
  lines = by_process(done.stdout)
  assert "started" in lines[0] and "started" in lines[1]
  assert alive(token) == []


def test_a_process_that_ignores_sigterm_is_killed():
  done = launch(2, "bash", "-c", "((DPR_PROCESS_ID)) && exit 5; trap '' TERM; "
                "for i in {1..3000}; do sleep 0.1; done", env={"DPR_GRACE_SECONDS": "1"})
  assert done.returncode == 5


def test_a_killed_process_and_a_missing_command():
  assert launch(2, "bash", "-c", "((DPR_PROCESS_ID)) && kill -9 $$; sleep 300").returncode == 137
  assert launch(2, "no-such-command-here").returncode == 127


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signals_are_passed_on_once_and_waited_for(name, code):
  program = (
    "import signal, sys, time\n"
    "def stop(number, frame):\n"
    "  print('saving', flush=True); time.sleep(0.5); print('saved', flush=True)\n"
    "  sys.exit(128 + number)\n"
    f"signal.signal(signal.{name}, stop)\n"
    "print('ready', flush=True)\n"
    # Not one long sleep: Python runs a handler between two of its instructions, and a signal that
    # comes between the last of them and the sleep would wait for the end of it.
    "for _ in range(6000): time.sleep(0.05)\n")
  # A shell cannot trap what it was started to ignore, as jobs in the background are SIGINT.
  heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
  with subprocess.Popen([SCRIPT, "2", "--", sys.executable, "-c", program], env=JAX_ENV, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        preexec_fn=heed) as process:
    head = [process.stdout.readline() for _ in range(2)]
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
  assert process.returncode == code
  lines = by_process("".join(head) + out)
  assert lines == {0: ["ready", "saving", "saved"], 1: ["ready", "saving", "saved"]}
  assert err == ""


def test_a_second_signal_kills():
  program = ("trap 'echo ignored' TERM; echo ready; for i in {1..3000}; do sleep 0.1; done")
  with subprocess.Popen([SCRIPT, "1", "--", "bash", "-c", program], env=JAX_ENV, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    assert process.stdout.readline() == "[0] ready\n"
    process.send_signal(signal.SIGTERM)
    while process.stdout.readline() != "[0] ignored\n":
      assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
  assert process.returncode == 137


@pytest.mark.parametrize("arguments, pattern", [
  ([], "must be the number of processes, not ''"),
  (["0", "--", "true"], "must be the number of processes, not '0'"),
  (["two", "--", "true"], "not 'two'"),
  (["2", "true"], "expected -- between"),
  (["2", "--"], "no command after --"),
])
def test_usage(arguments, pattern):
  done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and pattern in done.stderr and done.stderr.count("\n") == 1
  done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout.startswith("usage: ")
