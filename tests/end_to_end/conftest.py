"""One run of the smallest config, shared by the tests that look at what it left."""

import json
import os
import pathlib
import subprocess
import sys
import types

import filelock
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/smoke.py:debug"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
  """A folder of this test run, whichever of its processes asks."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "end_to_end"
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope="session", autouse=True)
def shared_compilations(shared_folder):
  """Runs of one config compile the same programs; they are compiled once."""
  patch = pytest.MonkeyPatch()
  patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared_folder / "compilations"))
  patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
  yield
  patch.undo()


def run_main(workdir, *flags, config=CONFIG, prefix=(), **popen):
  """The main entry point as a process of its own, from the root of the repository."""
  command = [*prefix, sys.executable, "-m", "dpr_jax.main", f"--config={config}"]
  command += [f"--workdir={workdir}", *flags]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
      command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      **popen,
  )


def finish(process, timeout=600):
  """(stdout, stderr) of a process that must succeed."""
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == 0, err[-4000:]
  return out, err


@pytest.fixture(scope="session")
def entry_point():
  """`start(workdir, *flags)` -> process, `finish(process)` -> (stdout, stderr), and the root."""
  return types.SimpleNamespace(start=run_main, finish=finish, root=ROOT)


@pytest.fixture(scope="session")
def finished_run(shared_folder):
  """(workdir, stdout, stderr) of an uninterrupted run."""
  workdir, outputs = shared_folder / "whole", shared_folder / "outputs.json"
  with filelock.FileLock(f"{outputs}.lock"):
    if not outputs.exists():
      outputs.write_text(json.dumps(finish(run_main(workdir))))
    return workdir, *json.loads(outputs.read_text())
