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
  from dpr_jax.methods import base
  from dpr_jax.run import set_up
  from dpr_jax.signals import handled
  from dpr_jax.training.metrics import read_metrics
  from dpr_jax.workdir import Workdir

  config = debug_config(default_config())
  config.data.num_demos, config.data.tasks, config.eval.frontier_samples = 60, ("sort",), 0
  config.sft.steps, config.sft.batch_size = 8, 8
  config.log.progress = config.log.tensorboard = False
  config.methods.cleaned_sft.reference_fraction = 0.5
  config.compare = ("cleaned_sft",)
  config = resolve(config)
  out = []
  for shape in meshes:
    devices, stopped = {}, []
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1] * shape[2]])
    workdir = Workdir(os.path.join(folder, "_".join(map(str, shape))))
    made = base.make_training

    def training(run, name, *args, made=made, devices=devices):
      devices[name] = sorted(d.id for d in run.mesh.devices.flat)
      return made(run, name, *args)

    from dpr_jax.methods import sft

    sft.make_training = training
    with jax.set_mesh(mesh):
      run = set_up(config, workdir, mesh)
      judge = lambda: config.methods["cleaned_sft"].judge(run, "cleaned_sft")
      if shape[0] > 1:  # Both folds save the step that they have reached.
        from dpr_jax.training import loop

        write, seen = loop.MetricsWriter.write, []

        def written(self, step, metrics):
          write(self, step, metrics)
          seen.append(step)
          if len(seen) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

        loop.MetricsWriter.write = written
        try:
          with handled():
            judge()
        except Stopped:
          stopped = [len(read_metrics(workdir.stage(f"cleaned_sft/fold{f}") / "metrics.jsonl"))
                     for f in range(2)]
        finally:
          loop.MetricsWriter.write = write
      lines = judge()
    steps = [[line["step"] for line in read_metrics(
        workdir.stage(f"cleaned_sft/fold{f}") / "metrics.jsonl")] for f in range(2)]
    out.append([[line["reward_sum"] for line in lines], devices, steps, stopped])
  return out


def test_folds_side_by_side_judge_as_one_after_the_other(run_on_devices, tmp_path):
  meshes = [[1, 1, 1], [2, 2, 1]]
  one, parts = run_on_devices(judge_on, meshes, str(tmp_path), devices=4).result
  rewards, devices, steps, stopped = parts
  assert one[1] == {"cleaned_sft/fold0": [0], "cleaned_sft/fold1": [0]}
  assert devices == {"cleaned_sft/fold0": [0, 1], "cleaned_sft/fold1": [2, 3]}
  assert sorted(stopped) == [4, 4] and steps == [list(range(1, 9))] * 2
  assert rewards == pytest.approx(one[0], abs=2e-4) and min(rewards) != max(rewards)
