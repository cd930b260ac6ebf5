"""Which parameters are pi_ref: one kind per file."""

from dpr_jax.references.base import Reference, ReferenceKind, combine_logps

__all__ = ["Reference", "ReferenceKind", "combine_logps"]
