"""What this device can do at best: matmul FLOP/s and memory bytes/s, measured beside the rest.

    python -m benchmarks.peak_rates --dtype=float32
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from benchmarks import protocol
from dpr_jax.keys import make_key
from dpr_jax.loading import compute_dtype


class PeakRates:
  """A square matmul for arithmetic; a copy and a sum over a large array for memory."""

  def __init__(self, dtype: str, size: int = 0, megabytes: int = 0):
    on_cpu = jax.default_backend() == "cpu"
    self.dtype = compute_dtype(dtype)
    self.size = size or (2048 if on_cpu else 8192)
    self.bytes = (megabytes or (512 if on_cpu else 2048)) << 20

  def setup(self) -> dict:
    a = jax.random.normal(make_key(0), (self.size, self.size), jnp.float32)
    a = a.astype(self.dtype)
    x = jnp.ones((self.bytes // 4,), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    copy, total = jax.jit(lambda x: x + 1.0), jax.jit(jnp.sum)
    self.calls = {
        "matmul": (lambda: product(a), 2 * self.size**3),
        "copy": (lambda: copy(x), 2 * self.bytes),
        "sum": (lambda: total(x), self.bytes),
    }
    self.round()
    return {}

  def round(self) -> dict[str, float]:
    """{"matmul": FLOP/s, "copy": bytes/s, "sum": bytes/s}, each the best of three."""
    out = {}
    for name, (call, amount) in self.calls.items():
      seconds = []
      for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
      out[name] = amount / min(seconds)
    return out

  def finish(self) -> dict:
    return {}


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
  """{"flops_per_s", "bytes_per_s"}: a ceiling is the best that was ever seen."""
  return {
      "flops_per_s": max(r["matmul"] for r in rounds),
      "bytes_per_s": max(max(r["copy"], r["sum"]) for r in rounds),
  }


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
  parser.add_argument("--size", type=int, default=0, help="of the matrix; 0: by platform")
  parser.add_argument("--megabytes", type=int, default=0, help="of the array; 0: by platform")
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  make = lambda: PeakRates(args.dtype, args.size, args.megabytes)
  if args.worker:
    protocol.serve(make)
    return
  peak_rates = make()
  peak_rates.setup()
  print(json.dumps({"benchmark": "peak_rates", **best([peak_rates.round() for _ in range(3)])}))


if __name__ == "__main__":
  main()
