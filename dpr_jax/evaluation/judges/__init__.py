"""Judges, one per file; see `judges.base`."""

from dpr_jax.evaluation.judges.base import Judge, Question

__all__ = ["Judge", "Question"]
