"""Any model of the same shape and vocabulary, by its path."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.references.base import Reference, ReferenceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(ReferenceKind):
  """A checkpoint of the run's shape and vocabulary: a Hugging Face folder, .gguf file or stage."""

  kind = "checkpoint"
  path: str = setting("", "the checkpoint, such as runs/other/sft@0.5")

  def check(self, config):
    if not self.path:
      raise ValueError("path is missing; name a Hugging Face folder, a .gguf file or a stage")

  def checkpoints(self):
    return {"path": self.path}

  def __call__(self, run, dtype):
    return Reference((run.other_checkpoint(self.path, dtype),))

  def describe(self):
    return f"ref {self.path}"
