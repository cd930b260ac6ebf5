"""Attention kernels on the rows and heads of each device: a mesh against one device.

The program below runs in a process of its own; see conftest.py.
"""


def differences(cases):
  """Largest differences of splash on a mesh from XLA on one device: of output and gradients."""
  import jax
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.models import attention as attention_lib

  jax.config.update("jax_disable_most_optimizations", True)  # The time is that of the compiler.

  def run(backend, q, k, v, d_out, segments):
    def attend(q, k, v):
      q = sharding.constrain(q, "batch", "sequence", "heads", "head_dim")
      k = sharding.constrain(k, "batch", "sequence", "kv_heads", "head_dim")
      return attention_lib.self_attention(q, k, v, segments, window=9, scale=0.4, backend=backend)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)

  draw, found = np.random.default_rng(), []
  for mesh_shape, batch, heads, kv_heads in cases:
    shapes = [(batch, 40, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    inputs = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    inputs.append(np.sort(draw.integers(1, 4, (batch, 40)), axis=1).astype(np.int32))
    expected = jax.jit(run, static_argnums=0)("xla", *inputs)
    mesh = sharding.make_mesh(*mesh_shape, devices=jax.devices()[: int(np.prod(mesh_shape))])
    with jax.set_mesh(mesh):
      got = jax.jit(run, static_argnums=0)("splash", *inputs)
      split = not got[0].sharding.is_fully_replicated
    errors = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(got, expected)]
    found.append((split, errors))
  return found


def test_a_mesh_does_not_change_attention(run_on_devices):
  cases = [
      ((2, 2, 2), 4, 4, 2),  # everything divides.
      ((1, 2, 4), 2, 8, 2),  # tensor is a multiple of the KV heads: a device reads one of them.
      ((2, 1, 4), 2, 12, 3),  # a device's 3 heads begin inside of groups of 4 and read one or two.
      ((1, 4, 2), 3, 3, 1),  # neither rows nor heads divide: every device computes all.
  ]
  results = run_on_devices(differences, cases).result
  assert [split for split, _ in results] == [True, True, True, False]
  for _, errors in results:
    assert max(errors) < 2e-5  # Float32 rounding of sums over 40 tokens and up to 4 heads.
