"""A run with a short SFT stage behind it, for the stages that follow."""

import contextlib

import jax
import pytest


@pytest.fixture(scope="module")
def train_sft(tmp_path_factory):
  """train_sft(change) -> Run on one device, under its mesh; `change(config)` is made first.

  With steps=False nothing is trained.
  """
  from dpr_jax import sharding
  from dpr_jax.config import default_config, resolve, shrink
  from dpr_jax.stages.context import set_up
  from dpr_jax.stages.sft import sft_stage
  from dpr_jax.workdir import Workdir

  with contextlib.ExitStack() as meshes:

    def train(change, steps=True):
      config = shrink(default_config())
      config.model.remat = "none"
      config.sft.steps, config.sft.optimizer.learning_rate = 10, 0.02
      config.dpr.max_new_tokens = config.eval.max_new_tokens = 6
      config.data.tasks = ("add", "sort")
      config.log.progress = config.log.tensorboard = False
      change(config)
      mesh = sharding.make_mesh(devices=jax.devices()[:1])
      meshes.enter_context(jax.set_mesh(mesh))
      run = set_up(resolve(config), Workdir(tmp_path_factory.mktemp("run") / "w"), mesh)
      if steps:
        sft_stage(run)
      return run

    yield train
