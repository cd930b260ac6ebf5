"""Faults at random moments of a small run: what is lost, what is wrong, what hangs.

    python -m benchmarks.soak --faults=50 [--seed=N]

A run is killed, stopped, damaged and starved, and begun again each time by the same command, until
it ends; then the next one. Every run that ends must hold what an undisturbed one holds: the arrays
of the last checkpoints bit by bit, metrics, samples and figures to the digit (`wrong_results`);
every process must end on its own (`hangs`). A flipped bit is either mended (`recoveries`), or
refused in one line that names a file (`refusals`; the bit is then flipped back, as from a copy).
What is neither is `unexpected`, with the last line of stderr.

Kinds of faults: SIGKILL, SIGTERM, SIGINT; `flip`, one bit of a file of one class; `files`, a start
with too few file descriptors; `transient`, a running process that can open no file for some seconds
(Linux); `one_of_two`, one of two processes is killed, `stop_of_two`, gets SIGTERM or SIGINT.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from benchmarks.common import positive
from dpr_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIGHT = (
    "--config.log.progress=False", "--config.model.shape.num_layers=1", "--config.compare=dpr",
    "--config.eval.frontier_samples=0", "--config.eval.corrupted_tokens=0",
    "--config.eval.heatmaps=0", "--config.eval.reference_prompts=0", "--config.checkpoint.every=4",
    "--config.log.tensorboard=False",
)
CODES = {"SIGKILL": (-9,), "SIGTERM": (143,), "SIGINT": (130,)}
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "flip", "flip", "flip", "files", "transient",
         "one_of_two", "stop_of_two")
CLASSES = {  # of files, by their place in the workdir.
    "config": r"\.?config\.json", "tokenizer": r"tokenizer/.*", "metrics": r"\w+/metrics\.jsonl",
    "meta": r"\w+/checkpoints/\d+/(meta/.*|_\w+)", "samples": r"samples/.*",
    "arrays": r"\w+/checkpoints/\d+/(variables|training|ema)/.*", "report": r"report/.*",
    "reference": r"reference\.json|\w+/stopped\.json",
    "records": r"checksums\.json|\w+/checkpoints/\d+/(files\.json|commit_success\.txt)",
}


def start(workdir, cache, *, process=None, port=0, descriptors=0):
  """The run as a process of its own; `process`: its index among two."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  if process is not None:
    environment |= {"DPR_COORDINATOR": f"127.0.0.1:{port}", "DPR_NUM_PROCESSES": "2",
                    "DPR_PROCESS_ID": str(process)}
  limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
  command = [sys.executable, "-m", "dpr_jax.main", f"--config={ROOT}/configs/smoke.py:debug",
             f"--workdir={workdir}", f"--compilation_cache={cache}", *LIGHT]
  with open(f"{workdir}.stderr{process or 0}", "w") as stderr:
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                            stderr=stderr, preexec_fn=limit if descriptors else None)


def outcome(workdir):
  """What a finished run holds, without times."""
  lines = {
      path.parent.name: [{k: v for k, v in line.items() if k != "seconds"}
                         for line in read_metrics(path)]
      for path in sorted(workdir.glob("*/metrics.jsonl"))
  }
  results = json.loads((workdir / "report/results.json").read_text(encoding="utf-8"))
  samples = {p.name: p.read_text() for p in sorted((workdir / "samples").glob("*.jsonl"))}
  arrays = {}  # Fingerprints, of the last checkpoint of each stage.
  for folder in sorted(workdir.glob("*/checkpoints")):
    last = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
    meta = json.loads((folder / str(last) / "meta/metadata").read_text(encoding="utf-8"))
    arrays[folder.parent.name] = last, meta["hashes"]
  return {"metrics": lines, "systems": results["systems"], "samples": samples, "arrays": arrays}


def ahead_of_checkpoints(workdir):
  """Steps that were made and are in no checkpoint, over all stages."""
  lost = 0
  for path in workdir.glob("*/metrics.jsonl"):
    saved = [int(p.name) for p in (path.parent / "checkpoints").glob("*") if p.name.isdigit()]
    steps = [line["step"] for line in read_metrics(path)]
    lost += max(max(steps, default=0) - max(saved, default=0), 0)
  return lost


@dataclasses.dataclass
class Soak:
  """The runs, one after the other, and what was counted."""

  folder: pathlib.Path
  rng: random.Random
  deadline: float  # seconds in which a process must end after a signal, or its peer's death.
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  unexpected: list = dataclasses.field(default_factory=list)
  number: int = 0

  @property
  def workdir(self):
    return self.folder / f"run{self.number}"

  @property
  def cache(self):
    return self.folder / "compiled"

  def reference(self):
    """The undisturbed run; once more with compiled programs, for its duration."""
    for name in ("first", "whole"):
      begin = time.monotonic()
      assert start(self.folder / name, self.cache).wait() == 0
    self.whole, self.seconds = outcome(self.folder / "whole"), time.monotonic() - begin

  def wait(self, process, seconds):
    """The exit code; None, and a hang is counted, if there is none in time."""
    try:
      return process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      self.counts["hangs"] += 1

  def said(self, workdir=None):
    return pathlib.Path(f"{workdir or self.workdir}.stderr0").read_text().strip().splitlines()

  def odd(self, kind, code):
    self.unexpected.append(f"{kind}: exit code {code}: {' | '.join(self.said()[-1:])[:200]}")

  def ended(self, fault, resumed):
    """The run is finished: compares it, and begins another."""
    if outcome(self.workdir) != self.whole:
      self.counts["wrong_results"] += 1
      self.unexpected.append(f"{fault}: other results in {self.workdir}")
    elif resumed:
      self.counts["recoveries"] += 1
    self.number += 1

  def go_on(self, fault):
    """Runs to the end, after a fault."""
    code = self.wait(start(self.workdir, self.cache), 20 * self.seconds + 60)
    if code == 0:
      self.ended(fault, resumed=True)
    elif code is not None:
      return code
    return 0

  def signalled(self, name):
    process = start(self.workdir, self.cache)
    try:
      process.wait(self.rng.uniform(0.2, 1.0) * self.seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(getattr(signal, name))
      code = self.wait(process, self.deadline)
      if code is not None and code not in (0, *CODES[name]):
        self.odd(name, code)
      self.counts["steps_lost"] += ahead_of_checkpoints(self.workdir)
    if process.returncode == 0:
      return self.ended(name, resumed=False)
    if self.rng.random() < 0.5 and (code := self.go_on(name)):
      self.odd(f"{name}, resumed", code)

  def files(self):
    """Those of the run that hold something, by class."""
    files = collections.defaultdict(list)
    for path in sorted(p for p in self.workdir.rglob("*") if p.is_file() and p.stat().st_size):
      for name, pattern in CLASSES.items():
        if re.fullmatch(pattern, path.relative_to(self.workdir).as_posix()):
          files[name].append(path)
    return files

  def flip(self):
    if not self.files():  # Nothing is begun: a finished run is damaged instead.
      shutil.copytree(self.folder / "whole", self.workdir, dirs_exist_ok=True)
    files = self.files()
    name = self.rng.choice(sorted(files))
    path = self.rng.choice(files[name])
    good = path.read_bytes()
    at, bad = self.rng.randrange(8 * len(good)), bytearray(good)
    bad[at // 8] ^= 1 << at % 8
    path.write_bytes(bad)
    fault = f"flip of bit {at} of {path.relative_to(self.workdir)}"
    self.faults[f"flip/{name}"] += 1
    if code := self.go_on(fault):
      said = self.said()
      if code == 2 and len(said) == 1 and str(self.folder) in said[0]:
        self.counts["refusals"] += 1
      else:
        self.odd(fault, code)
      if path.parent.is_dir():  # As from a copy.
        path.write_bytes(good)

  def starved(self):
    code = self.wait(start(self.workdir, self.cache, descriptors=self.rng.randint(12, 60)),
                     20 * self.seconds + 60)
    if code == 0:
      return self.ended("files", resumed=False)
    if code not in (None, 2):
      self.odd("files", code)

  def transient(self):
    process = start(self.workdir, self.cache)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(self.rng.uniform(0.1, 0.9) * self.seconds)
    if process.poll() is None:
      soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
      resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, hard))
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(self.rng.uniform(0.1, 3.0))
      if process.poll() is None:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    code = self.wait(process, 20 * self.seconds + 60)
    if code == 0:
      return self.ended("transient", resumed=True)
    said = self.said()
    if code == 2 and len(said) == 1:
      self.counts["refusals"] += 1
      if again := self.go_on("transient"):
        self.odd("transient, resumed", again)
    elif code is not None:
      self.odd("transient", code)

  def one_of_two(self, signum=signal.SIGKILL):
    workdir = self.folder / f"pair{self.number}_{sum(self.faults.values())}"
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    pair = [start(workdir, self.cache, process=i, port=port) for i in range(2)]
    time.sleep(self.rng.uniform(0.3, 1.2) * self.seconds)
    dead = self.rng.randrange(2)
    pair[dead].send_signal(signum)
    codes = [self.wait(process, self.deadline) for process in (pair[dead], pair[1 - dead])]
    if signum != signal.SIGKILL and None not in codes and not {*codes} <= {0, 128 + signum}:
      self.unexpected.append(f"{signum.name} of two: exit codes {codes}")
    if signum == signal.SIGKILL and codes[1]:
      said = pathlib.Path(f"{workdir}.stderr{1 - dead}").read_text().strip().splitlines()
      if codes[1] != 1 or len(said) != 1 or f"process {dead} " not in said[0]:
        self.unexpected.append(f"the other of two: exit code {codes[1]}: {len(said)} lines: "
                               f"{' | '.join(said[-1:])[:200]}")
    code = self.wait(start(workdir, self.cache), 20 * self.seconds + 60)
    losses = [line["loss"] for line in read_metrics(workdir / "sft/metrics.jsonl")]
    right = [line["loss"] for line in self.whole["metrics"]["sft"]]
    # On two devices sums are taken in another order.
    if code or len(losses) != len(right) or any(abs(a - b) > 1e-3 for a, b in zip(losses, right)):
      self.unexpected.append(f"{signum.name} of two: exit code {code}, {len(losses)} of "
                             f"{len(right)} steps: {' | '.join(self.said(workdir)[-1:])[:200]}")
    else:
      self.counts["recoveries"] += 1

  def inject(self, kind):
    self.faults[kind] += 1
    others = {"flip": self.flip, "files": self.starved, "transient": self.transient,
              "one_of_two": self.one_of_two,
              "stop_of_two": lambda: self.one_of_two(
                  self.rng.choice((signal.SIGTERM, signal.SIGINT)))}
    others.get(kind, lambda: self.signalled(kind))()


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--faults", type=positive, default=50, help="how many")
  parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of the faults")
  parser.add_argument("--deadline", type=float, default=60.0, help="seconds to end in")
  parser.add_argument("--kinds", default=",".join(KINDS), help="list; more often, more likely")
  parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
  args = parser.parse_args()
  print(f"seed {args.seed}", file=sys.stderr)
  begin, folder = time.monotonic(), pathlib.Path(tempfile.mkdtemp(prefix="soak"))
  soak = Soak(folder, random.Random(args.seed), args.deadline)
  soak.reference()
  kinds = args.kinds.split(",")
  for number in range(args.faults):
    # Every kind once, then at random.
    kind = kinds[number] if number < len(kinds) else soak.rng.choice(kinds)
    soak.inject(kind)
    print(f"{number + 1}: {kind}, {dict(soak.counts)}", file=sys.stderr)
  if soak.workdir.exists() and (code := soak.go_on("the end")):
    soak.odd("the end", code)
  counted = ("recoveries", "refusals", "steps_lost", "wrong_results", "hangs")
  print(json.dumps({
      "benchmark": "soak", "seed": args.seed, "faults": args.faults, "kinds": dict(soak.faults),
      **{name: soak.counts[name] for name in counted}, "unexpected": soak.unexpected,
      "seconds": round(time.monotonic() - begin),
  }))
  if not args.keep:
    shutil.rmtree(folder)


if __name__ == "__main__":
  main()
