"""Products of activations with a weight, differentiated as suits a CPU, and those of logits.

**The gradient of a weight** sums over all tokens. JAX writes it with the cotangent on the left, and
XLA's CPU backend transposes what stands on the left into a copy. The elementwise operations that
made the cotangent, those of the gated MLP above all, are fused into that copy and read each of
their inputs along its columns, dozens of times slower than along its rows. With the activations
on the left the copy is a plain one. Everywhere else layouts are the compiler's to choose.

**Logits** are float32, and so is their cotangent. Beside weights in bfloat16 it would make
the products of the backward pass float32 ones, at half of the speed or less.

Dims: T tokens or rows, I inputs, O outputs, V vocabulary, D hidden.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dpr_jax.models.attention import target_platform


def matmul(x: jax.Array, kernel: jax.Array, n_in: int) -> jax.Array:
  """[..., in dims] times [in dims, out dims] -> [..., out dims], summed over the `n_in` in dims.

  On one CPU device it has a backward pass of its own and so no forward-mode derivative
  (`jax.jvp` of it; reverse mode, and forward over reverse, are there).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if target_platform() == "cpu" and (mesh.empty or mesh.size == 1):
    return _matmul_on_cpu(x, kernel, n_in)
  return _matmul(x, kernel, n_in)


@jax.custom_jvp
def logits(hidden: jax.Array, table_VxD: jax.Array) -> jax.Array:
  """[..., D] times [V, D] -> float32 [..., V]; derivatives are products in the inputs' dtype.

  The sums within a product are float32 as ever. Of a derivative, what goes into the product is
  rounded: so would a layer's be, and a TPU rounds float32 factors anyway.
  """
  return _logits(hidden, table_VxD)


def _logits(hidden, table_VxD, dtype=jnp.float32):
  contract = (((hidden.ndim - 1,), (1,)), ((), ()))
  return jax.lax.dot_general(hidden, table_VxD, contract, preferred_element_type=dtype)


def _logits_jvp(primals, tangents):
  hidden, table_VxD = primals
  out = _logits(hidden, table_VxD)
  # Cast after the product, so that its transpose casts the cotangent before.
  tangent = lambda h, t: _logits(h, t, dtype=hidden.dtype).astype(jnp.float32)
  parts = []
  if not isinstance(tangents[0], SymbolicZero):
    parts.append(tangent(tangents[0], table_VxD))
  if not isinstance(tangents[1], SymbolicZero):
    parts.append(tangent(hidden, tangents[1]))
  return out, sum(parts) if parts else jnp.zeros_like(out)


logits.defjvp(_logits_jvp, symbolic_zeros=True)


def _matmul(x, kernel, n_in):
  contract = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in)))
  return jax.lax.dot_general(x, kernel, (contract, ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_on_cpu(x, kernel, n_in):
  return _matmul(x, kernel, n_in)


def _forward(x, kernel, n_in):
  # The kernel as it came: a scan keeps no copy of what it was given, but would of a reshaped one.
  # A frozen kernel needs no activations kept.
  kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
  return _matmul(x.value, kernel.value, n_in), kept


def _backward(n_in, kept, d_y):
  x, kernel = kept
  n_lead = d_y.ndim - (kernel.ndim - n_in) if x is None else x.ndim - n_in
  lead, outs = d_y.shape[:n_lead], d_y.shape[n_lead:]
  ins = kernel.shape[:n_in] if x is None else x.shape[n_lead:]
  d_TxO = d_y.reshape(math.prod(lead), math.prod(outs))
  d_x = d_kernel = None
  if kernel is not None:
    kernel_IxO = kernel.reshape(math.prod(ins), math.prod(outs))
    d_x = (d_TxO @ kernel_IxO.T).reshape(*lead, *ins)
  if x is not None:
    x_TxI = x.reshape(math.prod(lead), math.prod(ins))
    d_kernel = (x_TxI.T @ d_TxO).reshape(*ins, *outs)
  return d_x, d_kernel


_matmul_on_cpu.defvjp(_forward, _backward, symbolic_zeros=True)
