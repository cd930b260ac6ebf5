"""Which parameters are pi_ref: one kind a file."""

from dpr_jax.references.base import (
    Milestones,
    Reference,
    ReferenceKind,
    combine_logps,
    sft_milestones,
)

__all__ = ["Milestones", "Reference", "ReferenceKind", "combine_logps", "sft_milestones"]
