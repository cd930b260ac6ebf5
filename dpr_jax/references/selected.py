"""The best milestone of the SFT run by a criterion, measured on training prompts."""

import dataclasses
import json

import numpy as np

from dpr_jax.config.fields import setting
from dpr_jax.references.base import ReferenceKind
from dpr_jax.references.midrun import Midrun

CRITERIA = {"validation": "auc", "snr": "snr"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selected(ReferenceKind):
  """The best of all milestones before the end, by a criterion.

  validation  the area under the curve of corrupted tokens (`evaluation.corruption`).
  snr         signal to noise: mean r / std r over the tokens of responses sampled from sft. The
              mean is KL(sft || ref) per token; an early reference usually has the larger ratio.

  Both are computed on demonstrations that sft was trained on, never on prompts that are reported;
  they flatter sft, and all candidates alike.
  """

  kind = "selected"
  measured = True
  criterion: str = setting("validation", "measure of the best milestone", choices=tuple(CRITERIA))

  def check(self, config):
    if len(self._fractions(config)) < 2:
      raise ValueError("needs at least two sft.milestones, at different steps before the end")
    if not config.eval.reference_prompts:
      raise ValueError("is measured on eval.reference_prompts, which must be at least 1")

  def _fractions(self, config):
    kept = config.sft.milestone_steps()
    first = {step: f for f, step in reversed(kept.items()) if step != config.sft.steps}
    return sorted(first.values())

  def candidates(self, run):
    return [Midrun(fraction=f) for f in self._fractions(run.config)]

  def choose(self, candidates):
    """The one with the largest value of the criterion; the earliest of equals."""
    key = CRITERIA[self.criterion]
    values = np.asarray([c[key] for c in candidates], np.float64)
    if not np.isfinite(values).any():
      raise ValueError(f"criterion={self.criterion}: no candidate has a finite {key}; use longer "
                       "demonstrations, more prompts to measure on, or another criterion")
    return int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))

  def __call__(self, run, dtype):
    record = json.loads(run.workdir.reference_file.read_text(encoding="utf-8"))
    return Midrun(fraction=self._fractions(run.config)[record["chosen"]])(run, dtype)

  def describe(self):
    return f"ref a milestone of SFT selected by {self.criterion}"
