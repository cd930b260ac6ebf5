"""Tasks of EleutherAI/lm-evaluation-harness, or of a user's own YAML files for it."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.data.demos import Demo
from dpr_jax.errors import UserError
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import Column

_SEED = 1234  # of the harness, for its worked examples.


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
  """Data sets and metrics come from files and caches alone."""
  import datasets
  import evaluate
  from huggingface_hub import constants

  flags = ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"),
           (evaluate.config, "HF_EVALUATE_OFFLINE"))
  before = [getattr(*flag) for flag in flags]
  datasets.disable_progress_bars()
  try:
    for flag in flags:
      setattr(*flag, True)
    yield
  finally:
    for flag, value in zip(flags, before, strict=True):
      setattr(*flag, value)


@functools.cache
def _manager(path: str) -> Any:
  """The harness's index of the tasks of a folder, or of its own."""
  from lm_eval.tasks import TaskManager

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  if not path:
    return TaskManager()
  folder = pathlib.Path(path)
  if not folder.is_dir() and folder.suffix not in (".yaml", ".yml"):
    raise UserError(f"--data={path}: expected a folder with the .yaml files of tasks, or one of "
                    "them; it names the files of its data in dataset_kwargs: data_files")
  return TaskManager(include_path=folder if folder.is_dir() else folder.parent,
                     include_defaults=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMEval(Benchmark):
  """--benchmark=lm_eval:TASK,...; --data is a folder of task YAMLs, else the harness's own tasks.

  Figures are the harness's. Of a mean over documents the interval is that of this package, of
  others 1.96 of the harness's standard errors, or null where it has none.
  """

  kind = "lm_eval"
  title = "lm-evaluation-harness"
  packages = ("lm-eval",)
  argument = "tasks"
  needs_data = None
  own_requests = True
  scores = {"task/metric": Column("A metric of a task")}  # Of each task of the harness.
  tasks: tuple[str, ...] = setting((), "names of tasks or groups")
  num_fewshot: int | None = setting(None, "worked examples; by default those of the task", low=0)
  chat: bool = setting(False, "whether prompts are rendered by the chat template")

  @contextlib.contextmanager
  def _errors(self, hint: str) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # A task is a program: it can raise anything.
      raise UserError(f"--benchmark=lm_eval:{','.join(self.tasks)} cannot be loaded ({hint}): "
                      f"{type(e).__name__}: {e}") from None

  def load(self, path: str) -> Any:
    """The harness's TaskDict, set up for a run.

    Raises:
      UserError: an unknown task, one that cannot be loaded, or data that are not local.
    """
    if not self.tasks:
      raise UserError("--benchmark=lm_eval names no task; for example lm_eval:arc_easy,gsm8k")
    if path and not pathlib.Path(path).exists():
      raise UserError(f"--data={path}: no such file or folder")
    with _no_downloads():
      manager = _manager(path)
      for name in self.tasks:
        if name not in manager.all_tasks:
          there = f"--data={path} has {', '.join(manager.all_tasks) or 'none'}" if path else (
              "lm-eval ls tasks lists them")
          raise UserError(f"--benchmark=lm_eval: there is no task {name!r}; {there}")
      with self._errors("its data must be local, nothing is downloaded"):
        loaded = manager.load(list(self.tasks))
    random.seed(0)
    np.random.seed(_SEED)
    for task in loaded["tasks"].values():
      if self.num_fewshot is not None or task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
      task.set_fewshot_seed(seed=_SEED)
    return loaded

  def read(self, path, limit=0):
    """The documents of the tasks."""
    tasks, demos = self.load(str(path))["tasks"], []
    with self._errors("its documents cannot be read"):
      for name, task in tasks.items():
        for i, doc in task.doc_iterator(limit=limit or None):
          user = {"role": "user", "content": str(task.doc_to_text(doc))}
          demos.append(Demo((user,), task=name, meta={"doc": doc}, source=f"{name}[{i}]"))
    return demos

  def run(self, data, limit, **how):
    from dpr_jax.evaluation.harness import HarnessRun

    return HarnessRun(self, data=data, limit=limit, **how)

