"""The methods that a run can compare: one per file.

A file declares a frozen dataclass with the fields, the label and the programs of its method, and
maps default names to values in `DEFAULTS`. Nothing else has to list it.
"""

from dpr_jax.methods.base import Method, TrainedMethod
from dpr_jax.methods.dpr import DPR
from dpr_jax.methods.on_demos import DemoMethod
from dpr_jax.methods.on_pairs import PairMethod

__all__ = ["DPR", "DemoMethod", "Method", "PairMethod", "TrainedMethod"]
