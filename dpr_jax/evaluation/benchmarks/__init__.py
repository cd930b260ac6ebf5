"""Benchmarks, one per file; see `benchmarks.base`."""

from dpr_jax.evaluation.benchmarks.base import Benchmark

__all__ = ["Benchmark"]
