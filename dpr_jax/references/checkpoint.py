"""Any model of the same shape and vocabulary, by its path."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(ReferenceKind):
  """A checkpoint outside of the run: a Hugging Face folder, .gguf, or stage of a workdir."""

  kind = "checkpoint"
  path: str = setting("", "such as runs/other/sft@0.5; of the run's shape and vocabulary")

  def check(self, config):
    if not self.path:
      raise ValueError("path is missing; name a Hugging Face folder, a .gguf file or a stage")

  def __call__(self, run, dtype):
    from dpr_jax.loading import load_checkpoint

    loaded = load_checkpoint(self.path, run.mesh, dtype)
    run.check_same_model(loaded, f"reference path={self.path}")
    return Reference((loaded.variables,))

  def describe(self):
    return f"ref {self.path}"
