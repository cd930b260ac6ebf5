"""Attention kernels give the same results on a mesh as on one device.

The program below runs in a separate process; see conftest.py.
"""


def differences(cases):
  """Largest differences in output and gradients between splash on a mesh and XLA on one device."""
  import jax
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.models import attention as attention_lib

  jax.config.update("jax_disable_most_optimizations", True)  # Compilation dominates the time.

  def run(backend, q, k, v, d_out, segments):
    def attend(q, k, v):
      q = sharding.constrain(q, "batch", "sequence", "heads", "head_dim")
      k = sharding.constrain(k, "batch", "sequence", "kv_heads", "head_dim")
      return attention_lib.self_attention(q, k, v, segments, window=9, scale=0.4, backend=backend)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)

  rng, found = np.random.default_rng(), []
  for mesh_shape, batch, heads, kv_heads in cases:
    shapes = [(batch, 40, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    inputs.append(np.sort(rng.integers(1, 4, (batch, 40)), axis=1).astype(np.int32))
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
      ((2, 2, 2), 4, 4, 2),  # Everything divides.
      ((1, 2, 4), 2, 8, 2),  # tensor is a multiple of the KV heads: each device reads one of them.
      ((2, 1, 4), 2, 12, 3),  # Each device has 3 heads of groups of 4, which read 1 or 2 KV heads.
      ((1, 4, 2), 3, 3, 1),  # Neither rows nor heads divide: every device computes everything.
  ]
  results = run_on_devices(differences, cases).result
  assert [split for split, _ in results] == [True, True, True, False]
  for _, errors in results:
    assert max(errors) < 2e-5  # Float32 rounding of sums over 40 tokens and up to 4 heads.
