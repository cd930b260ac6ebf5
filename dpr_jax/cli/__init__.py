"""The command line of all entry points: flags, exit codes, progress."""

from dpr_jax.cli.entry_point import readable, run_entry_point
from dpr_jax.cli.flags import check_methods, parse_flags

__all__ = ["check_methods", "parse_flags", "readable", "run_entry_point"]
