"""Every field of a run, declared once with its meaning, unit and bounds.

`default_config()` turns the dataclasses into an `ml_collections` config, which the files in
configs/ override and the command line overrides further (`--config.sft.steps=200`); `resolve()`
turns that back into a checked, frozen `RunConfig`. docs/configuration.md is made from the same
dataclasses (docs/make_configuration.py).
"""

from dpr_jax.config.fields import Value, setting
from dpr_jax.config.run_config import (
    RunConfig,
    debug_config,
    default_config,
    first_difference,
    resolve,
)
from dpr_jax.config.sections import ModelSection, OptimizerConfig
from dpr_jax.config.values import Config, to_json

__all__ = [
    "Config", "ModelSection", "OptimizerConfig", "RunConfig", "Value", "debug_config",
    "default_config", "first_difference", "resolve", "setting", "to_json",
]
