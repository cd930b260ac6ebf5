"""Folds that train on parts of a mesh at the same time find what they find one after the other."""

import pytest


def judge_on(meshes, folder):
  """Of a run on each mesh the rewards, the devices of each fold, and its steps.

  Where folds are side by side, a signal comes after their seventh step; the run then goes on.
  """
  import os
  import signal

  import jax

  from dpr_jax import sharding
  from dpr_jax.config import debug_config, default_config, resolve
  from dpr_jax.errors import Stopped
  from dpr_jax.methods import sft
  from dpr_jax.run import set_up
  from dpr_jax.signals import handled
  from dpr_jax.training import loop
  from dpr_jax.training.metrics import read_metrics
  from dpr_jax.workdir import Workdir

  config = debug_config(default_config())
  config.data.num_demos, config.data.tasks, config.eval.frontier_samples = 60, ("sort",), 0
  config.sft.steps, config.sft.batch_size = 8, 8
  config.log.progress = config.log.tensorboard = False
  config.methods.cleaned_sft.reference_fraction = 0.5
  config.compare = ("cleaned_sft",)
  config = resolve(config)

  def judge(shape):
    devices, seen, stopped = {}, [], []
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1] * shape[2]])
    workdir = Workdir(os.path.join(folder, "_".join(map(str, shape))))
    folds = [workdir.stage(f"cleaned_sft/fold{fold}") / "metrics.jsonl" for fold in range(2)]

    def training(run, name, *args):
      devices[name] = sorted(d.id for d in run.mesh.devices.flat)
      return made(run, name, *args)

    def written(self, step, metrics):
      write(self, step, metrics)
      seen.append(step)
      if len(seen) == 7:
        os.kill(os.getpid(), signal.SIGTERM)

    sft.make_training = training
    with jax.set_mesh(mesh):
      run = set_up(config, workdir, mesh)
      method = config.methods["cleaned_sft"]
      if shape[0] > 1:  # Both folds save the step that they have reached.
        loop.MetricsWriter.write = written
        try:
          with handled():
            method.judge(run, "cleaned_sft")
        except Stopped:
          stopped = [len(read_metrics(file)) for file in folds]
        finally:
          loop.MetricsWriter.write = write
      lines = method.judge(run, "cleaned_sft")
    steps = [[line["step"] for line in read_metrics(file)] for file in folds]
    return [line["reward_sum"] for line in lines], devices, steps, stopped

  made, write = sft.make_training, loop.MetricsWriter.write
  return [judge(shape) for shape in meshes]


def test_folds_side_by_side_judge_as_one_after_the_other(run_on_devices, tmp_path):
  meshes = [[1, 1, 1], [2, 2, 1]]
  one, parts = run_on_devices(judge_on, meshes, str(tmp_path), devices=4).result
  rewards, devices, steps, stopped = parts
  assert one[1] == {"cleaned_sft/fold0": [0], "cleaned_sft/fold1": [0]}
  assert devices == {"cleaned_sft/fold0": [0, 1], "cleaned_sft/fold1": [2, 3]}
  assert sorted(stopped) == [4, 4] and steps == [list(range(1, 9))] * 2
  assert rewards == pytest.approx(one[0], abs=2e-4) and min(rewards) != max(rewards)
