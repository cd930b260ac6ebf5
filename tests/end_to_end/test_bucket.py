"""A workdir in a bucket gives, bit for bit, what one on the disk gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dpr_jax import cli, evaluate, export, generate, main, score
from dpr_jax.training.metrics import read_metrics

CONFIG = "configs/smoke.py:debug"
# Training does not depend on what is evaluated after it, nor a system on the others.
FEW = ("--config.compare=continued_sft", "--config.eval.frontier_samples=0",
       "--config.eval.corrupted_tokens=0", "--config.eval.heatmaps=0",
       "--config.eval.reference_prompts=0", "--config.log.progress=False")


def assert_same(whole, other, stages, systems):
  """Metrics but for times, figures, and every response with its scores."""
  for stage in stages:
    one, two = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path)]
        for path in (w / stage / "metrics.jsonl" for w in (whole, other))
    )
    assert one and one == two, stage
  one, two = (json.loads((w / "report" / "results.json").read_text())["systems"]
              for w in (whole, other))
  assert two.keys() == {"base", "ref", "sft", *systems}
  for system in two:
    assert one[system] == two[system], system
    files = [w / "samples" / f"{system}.jsonl" for w in (whole, other)]
    assert files[0].read_bytes() == files[1].read_bytes(), system


@pytest.mark.slow
def test_a_killed_run_goes_on_to_what_the_disk_has(
    entry_point, finished_run, bucket, monkeypatch, capsys
):
  workdir = bucket / "killed"
  process = entry_point.start(workdir, *FEW)

  def wait(path):
    while not path.exists():
      assert process.poll() is None, process.communicate()[1][-2000:]
      time.sleep(0.1)

  wait(workdir / "config.json")
  monkeypatch.chdir(entry_point.root)
  again = [f"--config={CONFIG}", f"--workdir={workdir}", *FEW,
           f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"]
  with pytest.raises(SystemExit, match="2"):
    cli.run_entry_point(main.main, again)
  assert f"{workdir} is in use by process {process.pid} on " in capsys.readouterr().err
  wait(workdir / "sft" / "checkpoints" / "10" / "commit_success.txt")
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (workdir / "report").exists()
  main.main(again)
  assert_same(finished_run[0], workdir, ("sft", "continued_sft"), ("continued_sft",))
  there = {p.name for p in workdir.iterdir()}
  assert {"config.json", "checksums.json", "tokenizer", "tensorboard", "report"} <= there
  assert {name for name in there if name.startswith(".")} == {".config.json"}  # No lock is left.
  assert [p for p in workdir.glob("report/*.png")] and list(workdir.glob("tensorboard/sft/*"))
  assert "continued_sft" in (workdir / "report" / "report.html").read_text()


@pytest.mark.slow
def test_the_other_entry_points_read_and_write_buckets(entry_point, finished_run, bucket, tmp_path):
  entry_point.finish(entry_point.start(bucket / "run", *FEW))
  prompts = '{"prompt": "sort: 3 1 2"}\n{"prompt": "reverse: a b"}\n'
  outputs = []
  for place, run in ((bucket / "other", bucket / "run"), (tmp_path, finished_run[0])):
    (place / "in.jsonl").write_text(prompts)
    flags = [f"--input={place}/in.jsonl", f"--output={place}/out.jsonl", "--max_new_tokens=8"]
    generate.main([f"--model={run}/sft", *flags])
    score.main([f"--sft={run}/sft", f"--ref={run}/sft@0.5", f"--input={place}/out.jsonl",
                f"--output={place}/scored.jsonl", f"--html={place}/page.html"])
    export.main([f"--model={run}/sft", f"--output={place}/hf"])
    generate.main([f"--model={place}/hf", flags[0], f"--output={place}/again.jsonl", flags[2]])
    asked = [f"--model={run}/sft", "--benchmark=tasks", f"--output={place}/tasks",
             "--max_prompts=16", "--max_new_tokens=8"]
    evaluate.main(asked)
    responses = place / "tasks" / "responses.jsonl"
    whole = responses.read_bytes()
    responses.write_bytes(whole[:-20])  # As if it had been stopped.
    (place / "tasks" / "results.json").unlink()
    evaluate.main(asked)
    assert responses.read_bytes() == whole
    files = ("out.jsonl", "again.jsonl", "scored.jsonl", "hf/model.safetensors", "hf/config.json")
    outputs.append([whole, *((place / file).read_bytes() for file in files)])
  assert outputs[0] == outputs[1]


def two_processes(root, place, workdir, *flags):
  """A run of two hosts: nothing but the workdir is the same in both."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  running = []
  for index in range(2):
    home = place / f"host{index}"
    (home / "tmp").mkdir(parents=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root),
                   "HOME": str(home), "TMPDIR": str(home / "tmp"), "DPR_NUM_PROCESSES": "2",
                   "DPR_PROCESS_ID": str(index), "DPR_COORDINATOR": f"127.0.0.1:{port}"}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    command = [sys.executable, "-m", "dpr_jax.main", f"--config={root}/configs/smoke.py:debug"]
    running.append(subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags], cwd=home, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ))
  for process in running:
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out[-4000:]


@pytest.mark.slow
def test_hosts_that_share_nothing_but_a_bucket(entry_point, bucket, tmp_path):
  flags = ("--config.compare=continued_sft,dpr", "--config.log.progress=False")
  for workdir in (tmp_path / "disk", bucket / "two"):
    two_processes(entry_point.root, tmp_path / f"of_{workdir.name}", workdir, *flags)
  systems = ("continued_sft", "dpr")
  assert_same(tmp_path / "disk", bucket / "two", ("sft", *systems), systems)
  assert list((bucket / "two" / "compilation_cache").iterdir())


@pytest.mark.slow
def test_a_sweep_in_a_bucket_shares_its_stages(entry_point, bucket, tmp_path):
  flags = (*FEW[1:], "--config.compare=dpr", "--config.sweep.field=methods.dpr.beta",
           "--config.sweep.values=1.0,0.5")
  results = []
  for workdir in (tmp_path / "sweep", bucket / "sweep"):
    entry_point.finish(entry_point.start(workdir, *flags))
    point = workdir / "beta=0.5"
    assert (point / "sft" / "metrics.jsonl").read_bytes() == (
        workdir / "sft" / "metrics.jsonl").read_bytes()
    results.append(json.loads((workdir / "report" / "results.json").read_text()))
  points = [[(p["value"], p["systems"]) for p in r["sweep"]["points"]] for r in results]
  assert points[0] == points[1]
