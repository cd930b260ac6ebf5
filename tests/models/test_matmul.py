"""The matmul with a weight and its gradients equal the same sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import matmul as matmul_lib
from dpr_jax.models.matmul import matmul


def summed(x, kernel, n_in):
  """The matmul in float64, one output at a time."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  lead, size = x.shape[: x.ndim - n_in], int(np.prod(kernel.shape[:n_in]))
  out = np.zeros((int(np.prod(lead)), kernel.size // size))
  rows, columns = x.reshape(-1, size), kernel.reshape(size, -1)
  for t, o in np.ndindex(out.shape):
    out[t, o] = np.sum(rows[t] * columns[:, o])
  return out.reshape(*lead, *kernel.shape[n_in:])


@pytest.mark.parametrize(
    "lead, ins, outs",
    [((2, 5), (7,), (3,)), ((2, 5), (7,), (2, 3)), ((3, 1), (2, 4), (5,)), ((6,), (4,), (1,))],
)
def test_matmul_and_both_gradients(rng, lead, ins, outs):
  x, kernel = rng.normal(size=lead + ins), rng.normal(size=ins + outs)
  d_y = rng.normal(size=lead + outs)
  as32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
  (x_, kernel_), (d_y_,) = as32(x, kernel), as32(d_y)
  y, pull = jax.vjp(lambda x, k: matmul(x, k, len(ins)), x_, kernel_)
  d_x, d_kernel = pull(d_y_)
  # The gradients are the same if only one of the two is differentiated.
  (alone,) = jax.vjp(lambda x: matmul(x, kernel_, len(ins)), x_)[1](d_y_)
  np.testing.assert_array_equal(alone, d_x)
  (alone,) = jax.vjp(lambda k: matmul(x_, k, len(ins)), kernel_)[1](d_y_)
  np.testing.assert_array_equal(alone, d_kernel)

  close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  close(y, summed(x, kernel, len(ins)))
  reverse = np.moveaxis(kernel, range(len(ins)), range(-len(ins), 0))
  close(d_x, summed(d_y, reverse, len(outs)))
  tokens_last = np.moveaxis(x, range(len(lead)), range(-len(lead), 0))
  close(d_kernel, summed(tokens_last, d_y, len(lead)))


def test_gradients_keep_the_dtype_and_pass_through_other_transformations(rng):
  x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  loss = lambda kernel, x: jnp.sum(jnp.sin(matmul(x, kernel, 1)))
  plain = lambda kernel, x: jnp.sum(jnp.sin(x @ kernel))

  half = jax.grad(loss)(kernel.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  # Gradients per row, under remat, and a Hessian-vector product (forward over reverse).
  per_row = lambda f: jax.vmap(jax.grad(jax.checkpoint(f)), in_axes=(None, 0))(kernel, x)
  np.testing.assert_allclose(per_row(loss), per_row(plain), rtol=1e-5, atol=1e-5)
  direction = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
  curve = lambda f: jax.jvp(lambda k: jax.grad(f)(k, x), (kernel,), (direction,))[1]
  np.testing.assert_allclose(curve(loss), curve(plain), rtol=1e-5, atol=1e-5)


def test_a_mesh_of_several_devices_leaves_the_backward_pass_to_the_compiler():
  def text(devices):
    mesh = jax.sharding.AbstractMesh(
        (1, devices, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    )
    with jax.sharding.use_abstract_mesh(mesh):
      return str(jax.make_jaxpr(lambda x, k: matmul(x, k, 1))(np.ones((2, 3)), np.ones((3, 4))))

  assert "custom_vjp_call" in text(1)
  assert "custom_vjp_call" not in text(8)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_keeps_nothing_more(make_model, monkeypatch, remat):
  """Stacked over the layers, another copy of the weights would dominate the memory."""
  model, variables = make_model(0, num_layers=6, hidden_size=64, mlp_size=96, remat=remat)
  tokens = np.zeros((1, 4), np.int32)

  def temporaries():
    loss = lambda v: jnp.sum(model.apply(v, tokens)[0])
    return jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis().temp_size_in_bytes

  own = temporaries()
  monkeypatch.setattr(matmul_lib, "_matmul_on_cpu", matmul_lib._matmul)
  one_kernel = 6 * 4 * 64 * 64
  assert own < temporaries() + one_kernel


def test_logits_and_their_gradients_in_half_precision(rng):
  """Logits are float32; the backward pass only rounds operands and results to bfloat16."""
  hidden = jnp.asarray(rng.normal(size=(2, 7, 24)), jnp.bfloat16)
  table = jnp.asarray(rng.normal(size=(301, 24)), jnp.bfloat16)
  scale = 10.0 ** rng.uniform(-4, 0, (2, 7, 1))
  d_y = jnp.asarray(rng.normal(size=(2, 7, 301)) * scale, jnp.float32)
  y, pull = jax.vjp(matmul_lib.logits, hidden, table)
  d_hidden, d_table = pull(d_y)
  assert (y.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)

  h, w, d = (np.asarray(a, np.float64) for a in (hidden, table, d_y))
  np.testing.assert_allclose(y, np.einsum("btd,vd->btv", h, w), rtol=1e-5, atol=1e-5)
  unit = 2.0**-8  # The largest relative error of a rounding to bfloat16.

  def check(got, spec, other):
    exact, size = np.einsum(spec, d, other), np.einsum(spec, np.abs(d), np.abs(other))
    bound = 1.01 * unit * (size + np.abs(exact)) + 1e-6
    assert (np.abs(np.asarray(got, np.float64) - exact) <= bound).all()

  check(d_hidden, "btv,vd->btd", w)
  check(d_table, "btv,btd->vd", h)
  # On average the error is far below the bound, because the roundings of many terms cancel.
  exact = np.einsum("btv,btd->vd", d, h)
  error = np.abs(np.asarray(d_table, np.float64) - exact).sum() / np.abs(exact).sum()
  assert error < unit


def test_the_backward_matmuls_of_logits_are_in_half_precision():
  hidden, table = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((32, 8), jnp.bfloat16)
  both = jax.grad(lambda h, t: jnp.sum(matmul_lib.logits(h, t) ** 2), (0, 1))
  dots = [e for e in jax.make_jaxpr(both)(hidden, table).eqns if e.primitive.name == "dot_general"]
  operands = [tuple(str(v.aval.dtype) for v in e.invars) for e in dots]
  assert operands == [("bfloat16", "bfloat16")] * 3
  # A frozen table, as with adapters, needs no matmul for its gradient.
  one = jax.make_jaxpr(jax.grad(lambda h: jnp.sum(matmul_lib.logits(h, table) ** 2)))(hidden)
  assert str(one).count("dot_general[") == 2


def test_logits_in_float32_differentiate_forward_and_backward(rng):
  hidden, table, dh, dt = (
      jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(5, 6), (9, 6), (5, 6), (9, 6)]
  )
  plain = lambda h, t: h @ t.T
  for f in (matmul_lib.logits, jax.vmap(matmul_lib.logits, in_axes=(0, None))):
    out, tangent = jax.jvp(f, (hidden, table), (dh, dt))
    expected, expected_tangent = jax.jvp(plain, (hidden, table), (dh, dt))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tangent, expected_tangent, rtol=1e-5, atol=1e-5)
    got, want = (jax.vjp(g, hidden, table)[1](out) for g in (f, plain))
    for a, b in zip(got, want):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
