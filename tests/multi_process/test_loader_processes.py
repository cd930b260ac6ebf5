"""The global batch on the mesh does not depend on the number of processes."""

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Prints, from every process, what each global batch is: resumed at step 3 as well.
PROGRAM = """
import json
from dpr_jax import distributed
distributed.initialize()
import jax, numpy as np
from dpr_jax.data import (
  TASKS, encode_demo, make_demos, make_prompts, pack, prompt_batches, sft_batches)
from dpr_jax.sharding import make_mesh, place, to_host
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
demos = make_demos(list(TASKS), 150, seed=3)
rows = pack([encode_demo(d, tokenizer) for d in demos], 64, seed=3)
prompts = make_prompts(demos, tokenizer, 48).tokens
devices = jax.devices()
# Contiguous, with the devices of the processes interleaved, and with both holding every row.
MESHES = {
  "contiguous": make_mesh(data=2, fsdp=2),
  "interleaved": make_mesh(data=2, fsdp=2, devices=[devices[i] for i in (0, 2, 1, 3)]),
  "shared rows": make_mesh(data=1, fsdp=1, tensor=4),
}


def globally(batches, n, mesh=MESHES["contiguous"]):
  found = []
  for _ in range(n):
    batch = place(next(batches), mesh)
    for leaf in jax.tree.leaves(batch):
      assert leaf.shape[0] == 8 and len(leaf.sharding.device_set) == 4
    found.append([x.tolist() for x in jax.tree.leaves(to_host(batch))])
  return found


def sft(step):
  return sft_batches(rows, 8, seed=5, start_step=step)


def prompt(step):
  return prompt_batches(prompts, 8, 48, seed=5, start_step=step)


out = {"sft": globally(sft(0), 5), "prompt": globally(prompt(0), 5)}
for mesh in MESHES.values():
  assert globally(sft(0), 5, mesh) == out["sft"] and globally(prompt(0), 5, mesh) == out["prompt"]
assert globally(sft(3), 2) == out["sft"][3:] and globally(prompt(3), 2) == out["prompt"][3:]
print("BATCHES " + json.dumps(out))
"""


def run(processes: int) -> list[dict]:
  devices = 4 // processes
  done = subprocess.run(
    [ROOT / "launch/local_multiprocess.sh", str(processes), "--", sys.executable, "-c", PROGRAM],
    env={**os.environ, "PYTHONPATH": str(ROOT),
         "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
    capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stdout + done.stderr
  found = re.findall(r"^\[\d+\] BATCHES (.*)$", done.stdout, re.MULTILINE)
  assert len(found) == processes
  return [json.loads(f) for f in found]


def test_one_process_and_two_see_the_same_global_batches():
  alone, = run(1)
  assert len(alone["sft"]) == len(alone["prompt"]) == 5
  assert len({str(b) for b in alone["sft"]}) == 5  # batches differ
  first, second = run(2)
  assert first == alone and second == alone
