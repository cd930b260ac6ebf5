"""The product of activations with a weight, and the gradient of it that suits a CPU.

The gradient of a weight sums over all tokens. JAX writes it with the cotangent on the left, and
XLA's CPU backend transposes what stands on the left into a copy. The elementwise operations that
made the cotangent, those of the gated MLP above all, are fused into that copy and read each of
their inputs along its columns, dozens of times slower than along its rows. With the activations
on the left the copy is a plain one. Everywhere else layouts are the compiler's to choose.
"""

import math

import jax

from dpr_jax.models.attention import target_platform


def product(x: jax.Array, kernel: jax.Array, n_in: int) -> jax.Array:
  """[..., in dims] times [in dims, out dims] -> [..., out dims], summed over the `n_in` in dims.

  On one CPU device it has a backward pass of its own and so no forward-mode derivative
  (`jax.jvp` of it; reverse mode, and forward over reverse, are there).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if target_platform() == "cpu" and mesh.size <= 1:
    return _product_on_cpu(x, kernel, n_in)
  return _product(x, kernel, n_in)


def _product(x, kernel, n_in):
  contract = (tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in)))
  return jax.lax.dot_general(x, kernel, (contract, ((), ())))


def _product_on_cpu(x, kernel, n_in):
  shape, out_shape = kernel.shape[:n_in], kernel.shape[n_in:]
  x_TxI, kernel_IxO = x.reshape(-1, math.prod(shape)), kernel.reshape(math.prod(shape), -1)
  return _matmul(x_TxI, kernel_IxO).reshape(*x.shape[: x.ndim - n_in], *out_shape)


@jax.custom_vjp
def _matmul(x_TxI, kernel_IxO):
  return x_TxI @ kernel_IxO


def _forward(x_TxI, kernel_IxO):
  return x_TxI @ kernel_IxO, (x_TxI, kernel_IxO)


def _backward(kept, d_TxO):
  x_TxI, kernel_IxO = kept
  return d_TxO @ kernel_IxO.T, x_TxI.T @ d_TxO


_matmul.defvjp(_forward, _backward)
