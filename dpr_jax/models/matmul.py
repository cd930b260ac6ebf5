"""Matmuls of activations with weights, with a backward pass for CPUs, and the matmul of logits.

**The gradient of a weight** is a matmul that sums over all tokens. JAX makes the cotangent its
left operand, which XLA's CPU backend transposes into a copy. XLA fuses the elementwise operations
that produce the cotangent, in particular those of the gated MLP, into that copy, where they read
their inputs by columns, dozens of times slower than by rows. With the activations as the left
operand, the copy is a plain one. On other devices the compiler chooses the layouts.

**Logits** and their cotangents are float32. Together with bfloat16 weights, a float32 cotangent
would turn the matmuls of the backward pass into float32 ones, at half the speed or less.

Dims: T tokens or rows, I inputs, O outputs, V vocabulary, D hidden. Names of arrays whose rank
varies have no shape suffixes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dpr_jax.models.attention import target_platform


def matmul(x: jax.Array, kernel: jax.Array, n_in: int) -> jax.Array:
  """Contracts x [..., in dims] with kernel [in dims, out dims] over the `n_in` in dims.

  On a single CPU device it has a custom backward pass and therefore no forward-mode derivative
  (`jax.jvp`); reverse mode and forward-over-reverse mode work.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if target_platform() == "cpu" and (mesh.empty or mesh.size == 1):
    return _matmul_on_cpu(x, kernel, n_in)
  return _matmul(x, kernel, n_in)


@jax.custom_jvp
def logits(hidden: jax.Array, table_VxD: jax.Array) -> jax.Array:
  """Contracts hidden [..., D] with the table into float32 logits [..., V].

  The matmuls of the derivative have operands in the dtype of the inputs, like those of a layer,
  and accumulate in float32. The cotangent is rounded; a TPU rounds float32 operands anyway.
  """
  return _logits(hidden, table_VxD)


def _logits(hidden, table_VxD, dtype=jnp.float32):
  contract = (((hidden.ndim - 1,), (1,)), ((), ()))
  return jax.lax.dot_general(hidden, table_VxD, contract, preferred_element_type=dtype)


def _logits_jvp(primals, tangents):
  hidden, table_VxD = primals
  out = _logits(hidden, table_VxD)
  # The cast follows the matmul, so that its transpose casts the cotangent before the matmul.
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
  # The kernel is saved as given: a scan would store a copy of a reshaped one for every layer.
  # A frozen kernel does not need the activations.
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
