"""Runs functions of a test file in a separate process with several forced host devices."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

_MAIN = """
import importlib.util, json, sys, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module="dpr_jax")
warnings.filterwarnings("error", category=FutureWarning, module="dpr_jax")
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
path, name, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("program", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("\\nRESULT " + json.dumps(getattr(module, name)(*arguments)))
"""


class Finished(NamedTuple):
  """The outputs of a program."""

  result: Any  # the return value of the function, through JSON.
  stderr: str


@pytest.fixture(scope="session")
def run_on_devices():
  """run_on_devices(function, *arguments, devices=8) -> Finished.

  `function` must be at the top level of a test file that imports no jax at its top level.
  Arguments and results are passed as JSON. An exception fails the test with its traceback.
  """

  def run(function, *arguments, devices: int = 8, timeout: float = 600.0) -> Finished:
    path = pathlib.Path(function.__code__.co_filename).resolve()
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, str(path), function.__name__, json.dumps(arguments)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # The partitioner's warnings come from C++ and must not be filtered.
            "TF_CPP_MIN_LOG_LEVEL": "0",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
      output = f"{done.stdout}\n{done.stderr}"
      pytest.fail(f"{function.__name__} exited with {done.returncode}:\n{output}")
    result = done.stdout.rsplit("\nRESULT ", 1)[1]
    return Finished(json.loads(result), done.stderr)

  return run
