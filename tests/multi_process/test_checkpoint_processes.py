"""All processes decide together what becomes of a checkpoint, also if one alone cannot read it."""

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Prints, from every process, how each attempt to restore ends; reading step 3 fails in process 1.
PROGRAM = """
import json, pathlib, sys
from dpr_jax import distributed
distributed.initialize()
import jax, jax.numpy as jnp, numpy as np, optax
from dpr_jax import sharding
from dpr_jax.errors import UserError
from dpr_jax.training import checkpoints as lib, make_train_step

lib.RETRY_SECONDS = (0.01,)
folder, optimizer, mesh = pathlib.Path(sys.argv[1]), optax.sgd(0.1), sharding.make_mesh()
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
x = np.arange(8, dtype=np.float32)
w = lambda step: jax.make_array_from_callback((8,), split, lambda i: x[i] + step)
train_step = make_train_step(None, optimizer)
state = lambda step: train_step.init({"params": {"w": w(step)}}, jax.random.key(0))
describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
abstract = train_step.abstract({"params": {"w": describe(w(0))}}, jax.random.key(0))
with jax.set_mesh(mesh), lib.Checkpoints(folder, keep=2) as c:
  for step in (2, 3):
    c.save(state(step), step, {"next_step": step})
  c.wait()


def attempt(error):
  with jax.set_mesh(mesh), lib.Checkpoints(folder, keep=2) as c:
    real = c._read

    def read(step, items):
      if error and step == 3 and jax.process_index() == 1:
        raise error
      return real(step, items)

    c._read = read
    try:
      restored, data = c.restore(abstract)
      mine = [float(np.asarray(s.data)[0]) - s.index[0].start for s in
              restored.trainable["params"]["w"].addressable_shards]
      return [int(restored.step), data["next_step"], sorted(set(mine)), c.steps()]
    except UserError as e:
      return [str(e), c.steps()]


errors = (None, OSError(5, "Input/output error"), lib.Damaged("a checksum differs"), None)
print("ENDS " + json.dumps([attempt(e) for e in errors]))
"""


def test_one_process_that_cannot_read_decides_for_all(tmp_path):
  done = subprocess.run(
      [ROOT / "launch/local_multiprocess.sh", "2", "--", sys.executable, "-c", PROGRAM,
       str(tmp_path / "checkpoints")],
      env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  ends = [json.loads(x) for x in re.findall(r"^\[\d\] ENDS (.*)$", done.stdout, re.MULTILINE)]
  assert len(ends) == 2
  for healthy, unreadable, damaged, after in ends:
    assert healthy == [3, 3, [3.0], [2, 3]]
    assert "step 3" in unreadable[0] and "nothing was changed" in unreadable[0]
    assert unreadable[1] == [2, 3]
    assert damaged == after == [2, 2, [2.0], [2]]
  texts = sorted(end[1][0] for end in ends)
  assert "process 1 could not read it" in "".join(texts) and "Input/output" in "".join(texts)
  assert (tmp_path / "checkpoints" / "3.damaged" / "files.json").is_file()
