"""The section `model` of a config reaches the model that is built."""

import dataclasses

import pytest

from dpr_jax import config as config_lib
from dpr_jax.errors import UserError
from dpr_jax.stages.context import build_model


def _config(**model):
  config = config_lib.default_config()
  config.model.update(model)
  return config_lib.resolve(config)


def test_how_it_is_computed_is_taken_from_the_section():
  run = _config(attention="splash", remat="dots", dtype="bfloat16")
  _, model, _, _ = build_model(run)
  cfg = model.cfg
  assert (cfg.attention, cfg.remat, cfg.dtype) == ("splash", "dots", "bfloat16")
  assert dataclasses.replace(
      cfg, attention="auto", remat="full", dtype="float32", vocab_size=0
  ) == run.model.shape


def test_a_kernel_of_another_platform_is_refused_before_anything_is_written():
  with pytest.raises(UserError, match="config.model.attention=cudnn needs a GPU"):
    build_model(_config(attention="cudnn", dtype="bfloat16"))
