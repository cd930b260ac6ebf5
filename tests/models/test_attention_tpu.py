"""A whole train step compiles ahead of time for a TPU; needs libtpu but no TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

_PROGRAM = """
import json, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpr_jax import sharding
from dpr_jax.config import OptimizerConfig
from dpr_jax.data.batches import SFTBatch
from dpr_jax.losses import make_sft_loss
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.variables import abstract_variables
from dpr_jax.training import make_train_step
from dpr_jax.training.optimizer import make_optimizer
from dpr_jax.training.steps import abstract_state

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = sharding.make_mesh(1, 2, 2, devices=topology.devices)
cfg = ModelConfig(
    vocab_size=512, hidden_size=128, mlp_size=256, num_layers=4, num_heads=4, head_dim=64,
    layer_pattern=("local", "global"), window=100, dtype="bfloat16", **json.loads(sys.argv[1]),
)
optimizer = make_optimizer(OptimizerConfig(), 10)
rows = lambda dtype: jax.ShapeDtypeStruct((8, 300), dtype, sharding=sharding.batch_sharding(mesh))
batch = SFTBatch(
    tokens=rows(jnp.int32), segment_ids=rows(jnp.int32), loss_mask=rows(jnp.float32)
)
state = abstract_state(abstract_variables(cfg, mesh), optimizer, jax.random.key(0))
step = make_train_step(make_sft_loss(Transformer(cfg)), optimizer, accumulation=2)
with jax.set_mesh(mesh):  # Nothing may run under it: its devices cannot.
  text = step.lower(state, batch).compile().as_text()
print("\\nRESULT " + json.dumps([
    name for name in ("tpu_custom_call", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")
    if name in text
]))
"""

# The partitioner must warn about this program: a lookup in a table split over rows and columns, by
# tokens that are split over the axis of the columns and over another one.
_CONTROL = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dpr_jax import sharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
mesh = sharding.make_mesh(2, 4, 2, devices=topology.devices)
rows = ("data", "fsdp")
placed = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
look_up = jax.jit(lambda table, tokens: jax.lax.with_sharding_constraint(
    table[tokens], jax.P(rows, None, None)))
with jax.set_mesh(mesh):
  look_up.lower(placed((512, 256), jnp.bfloat16, "tensor", "fsdp"),
                placed((16, 64), jnp.int32, rows)).compile()
"""

_REMATERIALIZATION = "Involuntary full rematerialization"


def _run(program: str, *args: str) -> subprocess.CompletedProcess:
  done = subprocess.run(
      [sys.executable, "-c", program, *args],
      env={
          **os.environ,
          "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
          "JAX_PLATFORMS": "cpu",
          "TPU_SKIP_MDS_QUERY": "1",  # The host is no TPU VM and has no metadata server.
          "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
          # Log the partitioner's warnings to stderr, not only to files.
          "TPU_STDERR_LOG_LEVEL": "0",
          "TPU_MIN_LOG_LEVEL": "0",
          "TF_CPP_MIN_LOG_LEVEL": "1",
      },
      capture_output=True, text=True, timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return done


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_warnings_of_the_partitioner_are_captured():
  """Without this test, the absence of a warning would prove nothing."""
  assert _REMATERIALIZATION in _run(_CONTROL).stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "fields, kernels",
    [
        (dict(num_kv_heads=2, remat="full"), True),
        (dict(num_kv_heads=1, remat="dots"), True),  # Both devices of tensor hold the KV head.
        (dict(num_kv_heads=2, attention="xla"), False),
    ],
)
def test_a_train_step_for_tpu_holds_the_splash_kernels(fields, kernels):
  """Scan, remat, gradients, accumulation and a mesh of four devices around the kernels."""
  done = _run(_PROGRAM, json.dumps(fields))
  found = json.loads(done.stdout.rsplit("\nRESULT ", 1)[1])
  expected = ["tpu_custom_call", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]
  assert found == (expected if kernels else [])
  assert _REMATERIALIZATION not in done.stderr
