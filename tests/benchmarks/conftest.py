"""One line of each benchmark at toy shapes, made once."""

import functools
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODEL = f"--config={ROOT}/configs/smoke.py:debug"


@pytest.fixture(scope="session", autouse=True)
def importable():
  """`benchmarks` is a folder beside the package, not part of it."""
  sys.path.insert(0, str(ROOT))
  yield
  sys.path.remove(str(ROOT))


@pytest.fixture(scope="session")
def quick():
  """Small arrays for the peak rates, and hardly optimised programs, in processes as well."""
  import jax

  from benchmarks import peak_rates

  patch = pytest.MonkeyPatch()
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
  small = functools.partial(peak_rates.PeakRates, size=64, megabytes=1)
  patch.setattr(peak_rates, "PeakRates", small)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
  patch.undo()


# GiB of the logits of four columns of two rows; the vocabulary is that of the byte-level tokenizer.
BUDGET_OF_4 = 3 * 4 * 4 * 2 * 272 / 2**30

COMMANDS = {
    "sft_step": ["--batch=2", "--length=12", "--in_process"],
    # Processes of their own, with a peer.
    "score": ["--batch=2", "--length=12", "--peer=torch", f"--peer_python={sys.executable}"],
    "rollout": ["--batch=4", "--prompt=4", "--new=8", "--skew=3", "--slots=2", "--skew_rows=6",
                "--samples=2", "--samples_new=2", "--in_process"],
    "dpr_step": ["--batch=4", "--prompt=4", "--new=8", "--samples=2", "--slots=2", "--skew=3",
                 "--in_process"],
    "memory": ["--what=score", "--lengths=16", "--batches=2", "--in_process",
               f"--logits_budgets={BUDGET_OF_4},1000"],
    "scaling": ["--devices=2", "--batch=2", "--length=12"],
}


@pytest.fixture(scope="session")
def run_benchmark(quick):
  """run_benchmark(name, *flags, capsys=...) -> (record returned, text printed)."""
  import contextlib
  import importlib
  import io

  def run(name, *flags):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      record = importlib.import_module(f"benchmarks.{name}").main(
          [MODEL, "--repeats=2", *flags]
      )
    return record, printed.getvalue()

  return run


@pytest.fixture(scope="session")
def lines(run_benchmark):
  """lines(name) -> what the benchmark printed, as JSON."""

  @functools.cache
  def line(name):
    record, text = run_benchmark(name, *COMMANDS[name])
    assert text.count("\n") == 1 and text.endswith("\n"), "one line"
    assert json.loads(text) == json.loads(json.dumps(record))
    return json.loads(text)

  return line
