"""Two processes of two devices read one folder: each keeps its shards, and both export it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from dpr_jax import distributed
distributed.initialize()
import jax, numpy as np
from jax.experimental import multihost_utils
from dpr_jax.sharding import make_mesh, shardings_of
from dpr_jax.weights import load_pretrained, save_pretrained
from dpr_jax.weights.names import abstract_params

assert jax.process_count() == 2 and len(jax.local_devices()) == 2
cfg, params = load_pretrained(sys.argv[1], mesh=make_mesh(data=1, fsdp=2, tensor=2))
wanted = shardings_of(abstract_params(cfg), make_mesh(1, 2, 2))
for x, s in zip(*map(jax.tree.leaves, (params, wanted)), strict=True):
  assert x.sharding == s
  assert {shard.device for shard in x.addressable_shards} == set(jax.local_devices())
table = params["embed"]["table"]
assert not table.is_fully_addressable and table.addressable_shards[0].data.size * 4 == table.size
save_pretrained(sys.argv[2], cfg, params)
multihost_utils.sync_global_devices("exported")
print("EXPORTED")
"""


def test_two_processes_load_and_export_one_folder(tmp_path):
  import flax.linen as nn
  import jax
  import numpy as np

  from dpr_jax.models import ModelConfig
  from dpr_jax.weights import load_pretrained, save_pretrained
  from dpr_jax.weights.names import abstract_params

  cfg = ModelConfig(vocab_size=64, hidden_size=16, mlp_size=32, num_layers=3, num_heads=4,
                    num_kv_heads=2, head_dim=8, tied_head=False, qkv_bias=True)
  rng = np.random.default_rng(0)
  shapes = nn.unbox(abstract_params(cfg))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  save_pretrained(tmp_path / "a", cfg, params)
  done = subprocess.run(
    [ROOT / "launch/local_multiprocess.sh", "2", "--", sys.executable, "-c", PROGRAM,
     str(tmp_path / "a"), str(tmp_path / "b")],
    env={**os.environ, "PYTHONPATH": str(ROOT),
         "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    capture_output=True, text=True, timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert (done.stdout + done.stderr).count("EXPORTED") == 2
  before, after = ((tmp_path / d / "model.safetensors").read_bytes() for d in "ab")
  assert before == after
  assert load_pretrained(tmp_path / "b")[0] == cfg
