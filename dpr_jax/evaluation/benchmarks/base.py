"""What a benchmark is: prompts with what is known of them, and scores of responses.

A file of this package, or of a user, declares one. It reads its data, says what to generate, and
scores responses; `python -m dpr_jax.evaluate` and the evaluation of a run do the rest.
"""

import pathlib
from collections.abc import Mapping
from typing import ClassVar

from dpr_jax.config.fields import Value
from dpr_jax.data.formats import Demo, read_demos
from dpr_jax.evaluation.metrics import Column


class Benchmark(Value):
  """A frozen dataclass; its fields are its settings."""

  # Name of a score -> what it is. A run needs "accuracy", in [0, 1], among them.
  scores: ClassVar[Mapping[str, Column]] = {}
  max_new_tokens: ClassVar[int] = 256  # what `evaluate` generates unless told otherwise.
  stop_strings: ClassVar[tuple[str, ...]] = ()
  likelihood: ClassVar[bool] = False  # scores demonstrated responses by their log-probs instead.

  def read(self, path: str | pathlib.Path) -> list[Demo]:
    """The examples of a file: conversations that end with a reference response.

    Raises:
      UserError: another format; names the file and line.
    """
    return read_demos(path).demos

  def score(self, demo: Demo, text: str) -> Mapping[str, float]:
    """The scores of a response to an example."""
    raise NotImplementedError

  def score_logps(self, demo: Demo, logps) -> Mapping[str, float]:
    """With `likelihood`: the scores of the demonstrated response.

    Args:
      logps: float32 [T], of its tokens, EOS included, nats.
    """
    raise NotImplementedError

  def groups(self, demo: Demo) -> tuple[str, ...]:
    """Groups of examples whose accuracy is told apart."""
    return (demo.task,) if demo.task else ()

  def answer(self, demo: Demo, text: str) -> str:
    """What makes two right responses the same answer, for counting distinct ones."""
    return " ".join(text.split())
