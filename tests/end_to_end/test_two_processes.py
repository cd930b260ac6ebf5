"""The main entry point on two processes, through the launch script, against one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dpr_jax.training.metrics import read_metrics

# Training does not depend on what is evaluated after it: here, as little as there can be.
FLAGS = (
    "--config.compare=continued_sft,dpr", "--config.eval.frontier_samples=0",
    "--config.eval.corrupted_tokens=0", "--config.eval.heatmaps=0", "--config.log.progress=False",
)


def two_processes(workdir):
  command = ["bash", "launch/local_multiprocess.sh", "2", "--", sys.executable, "-m"]
  command += ["dpr_jax.main", "--config=configs/smoke.py:debug", f"--workdir={workdir}"]
  return [*command, *FLAGS]


def test_two_processes_train_like_one(entry_point, finished_run, tmp_path):
  whole, workdir = finished_run[0], tmp_path / "two"
  environment = {**os.environ, "PYTHONPATH": str(entry_point.root)}
  done = subprocess.run(
      two_processes(workdir), cwd=entry_point.root, env=environment, text=True, timeout=900,
      capture_output=True,
  )
  assert done.returncode == 0, done.stdout[-4000:]
  for stage in ("sft", "dpr", "continued_sft"):
    one, two = (read_metrics(w / stage / "metrics.jsonl") for w in (whole, workdir))
    assert [x["step"] for x in one] == [x["step"] for x in two]
    # The mesh has two devices here and one there: sums are taken in another order.
    for name in ("loss", "grad_norm", "tokens"):
      np.testing.assert_allclose(
          [x[name] for x in two], [x[name] for x in one], rtol=1e-4, atol=1e-6,
          err_msg=f"{stage} {name}",
      )
  results = [json.loads((w / "report" / "results.json").read_text()) for w in (whole, workdir)]
  names = {"base", "ref", "sft", "dpr", "continued_sft"}
  assert results[1]["systems"].keys() == names
  for name in names:
    a, b = (r["systems"][name]["heldout_nll"]["mean"] for r in results)
    np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_sigterm_saves_in_every_process_and_the_run_goes_on(entry_point, finished_run, tmp_path):
  whole, workdir = finished_run[0], tmp_path / "preempted"
  environment = {**os.environ, "PYTHONPATH": str(entry_point.root), "DPR_GRACE_SECONDS": "60"}
  with subprocess.Popen(
      two_processes(workdir), cwd=entry_point.root, env=environment, text=True,
      stdout=subprocess.PIPE,
  ) as process:
    started = workdir / "sft" / "metrics.jsonl"
    while not (started.exists() and len(read_metrics(started)) >= 2):
      assert process.poll() is None, process.stdout.read()[-3000:]
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
  assert process.returncode == 143, out[-3000:]
  steps = {int(p.name) for p in (workdir / "sft" / "checkpoints").iterdir() if p.name.isdigit()}
  saved = max(steps)
  message = rf"sft: stopped by SIGTERM; step {saved} is saved"
  assert saved < 20 and len(re.findall(message, out)) == 2
  # One process resumes from what two have saved.
  entry_point.finish(entry_point.start(workdir, *FLAGS))
  one, two = (read_metrics(w / "sft" / "metrics.jsonl") for w in (whole, workdir))
  assert [x["step"] for x in two] == [x["step"] for x in one]
  np.testing.assert_allclose([x["loss"] for x in two], [x["loss"] for x in one], rtol=1e-4)
