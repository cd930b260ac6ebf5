"""Two processes, as on two hosts that differ: both end in one line that says where."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Ends before anything is compiled, and without reading weights, where the processes differ.
MAIN = """
import os
os.chdir(os.environ["DPR_PROCESS_ID"])
from dpr_jax import cli, {entry_point}
cli.run_entry_point({entry_point}.main)
"""


def run(folder, entry_point, *flags):
  """Both processes' last lines; each has a folder of its own, with a file of its own."""
  for i in range(2):
    (folder / str(i)).mkdir()
    records = [{"prompt": f"{k}", "response": f"{i}"} for k in range(40)]
    (folder / str(i) / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  done = subprocess.run(
      [ROOT / "launch/local_multiprocess.sh", "2", "--", sys.executable, "-c",
       MAIN.format(entry_point=entry_point), *flags],
      cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      timeout=120,
  )
  assert done.returncode == 2, done.stdout[-3000:]
  return [[line for line in done.stdout.splitlines() if line.startswith(f"[{i}] error: ")]
          for i in range(2)]


CONFIG = f"--config={ROOT}/configs/smoke.py:debug"
OWN_FILE = ("--config.data.demos=data.jsonl", "--config.data.corrupt=0.0", "--config.data.tasks=",
            "--config.data.holdout=8", "--config.eval.num_prompts=8")


@pytest.mark.parametrize("entry_point, flags, named", [
    ("main", (CONFIG, "--workdir=../run", *OWN_FILE), "contents of config.data.demos: "),
    ("main", (CONFIG, "--workdir=run"), "--workdir=run does not hold here what process 0 has"),
    ("generate", ("--model=none", "--input=data.jsonl", "--output=out.jsonl"),
     "contents of --input=data.jsonl: "),
])
def test_processes_that_differ_end_before_anything_starts(tmp_path, entry_point, flags, named):
  lines = run(tmp_path, entry_point, *flags)
  for of_process in lines:
    assert len(of_process) == 1 and named in of_process[0] and "process 1" in "".join(lines[0])
  for name in ("run", "0/run", "1/run"):  # The folder may be there, for compiled programs.
    assert not (tmp_path / name / "config.json").exists()
