"""What a benchmark is: prompts with what is known of them, and scores of responses.

A file of this package, or of a user, declares one. It reads its data, declares what to generate,
and scores responses; `python -m dpr_jax.evaluate` and the evaluation of a run do the rest.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Contains(Benchmark):
      scores = {"accuracy": ACCURACY}

      def score(self, demo, text):
        return {"accuracy": float(demo.answer in text)}
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dpr_jax.config.fields import Value, title_of
from dpr_jax.data.demos import Demo, Message
from dpr_jax.data.formats import read_demos
from dpr_jax.evaluation.metrics import Column


class Benchmark(Value):
  """A frozen dataclass; its fields are its settings."""

  # Name of a score -> what it is. A run needs "accuracy", in [0, 1], among them.
  scores: ClassVar[Mapping[str, Column]] = {}
  # Figures that are not the mean of a score over prompts, such as a ratio of sums; see `summarize`.
  summaries: ClassVar[Mapping[str, Column]] = {}
  # False: it makes its own examples, and `read` is given ""; None: it has use for --data, or none.
  needs_data: ClassVar[bool | None] = True
  packages: ClassVar[tuple[str, ...]] = ()  # distributions of the extra `eval` that it imports.
  argument: ClassVar[str] = ""  # the field that --benchmark=KIND:VALUE sets.
  max_new_tokens: ClassVar[int] = 256  # what `evaluate` generates by default.
  stop_strings: ClassVar[tuple[str, ...]] = ()
  likelihood: ClassVar[bool] = False  # scores demonstrated responses by their log-probs instead.
  # Says itself what to generate and to measure, and takes no flags for that.
  own_requests: ClassVar[bool] = False

  # Where a demonstration gets a wrong token (`evaluation.corruption`): one with a digit, if any.
  corrupts_numbers: ClassVar[bool] = False

  def check(self, config):
    if "accuracy" not in self.scores:
      raise ValueError(f"a run needs a benchmark with accuracy; {title_of(self)} has "
                       f"{', '.join(self.scores)} and is for python -m dpr_jax.evaluate")

  def read(self, path: str | pathlib.Path, limit: int = 0) -> list[Demo]:
    """The examples of a file: conversations that end with a reference response.

    Args:
      limit: only the first so many; 0 takes all.

    Raises:
      UserError: another format; names the file and line.
    """
    return read_demos(path, limit=limit, extra_fields=("*",)).demos

  def prompt(self, demo: Demo) -> tuple[Message, ...]:
    """The prompt that `evaluate` uses: messages that end with a user turn."""
    return demo.prompt

  def later_turns(self, demo: Demo) -> tuple[str, ...]:
    """What the user says after the response to `prompt`, turn by turn; `evaluate` answers each."""
    return ()

  def score(self, demo: Demo, text: str) -> Mapping[str, float]:
    """The scores of a response to an example."""
    raise NotImplementedError

  def score_logps(self, demo: Demo, logps) -> Mapping[str, float]:
    """With `likelihood`: the scores of the demonstrated response.

    Args:
      logps: float32 [T], of its tokens, EOS included, nats.
    """
    raise NotImplementedError

  def is_wrong(self, demo: Demo, text: str) -> bool:
    """Whether a demonstrated response of which one token was replaced is wrong for it."""
    return not self.score(demo, text)["accuracy"]

  def wrong_demos(self, demos: Sequence[Demo]) -> list[bool] | None:
    """Whether each demonstrated response is wrong; None where the benchmark cannot tell."""
    return None

  def run(self, data: str, limit: int, **how: Any) -> Any:
    """What `evaluate` fills a folder with: a `BenchmarkRun`, or a subclass.

    Args:
      data, limit: what `read` was given.
      how: the other fields of a `BenchmarkRun`.
    """
    from dpr_jax.evaluation.benchmark_run import BenchmarkRun

    return BenchmarkRun(self, **how)

  def summarize(self, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """The `summaries`, {"mean", "ci95", "n"} each; that of a group is called NAME/GROUP.

    Args:
      records: the lines of responses.jsonl.
    """
    return {}

  def groups(self, demo: Demo) -> tuple[str, ...]:
    """Groups of examples whose accuracy is reported separately."""
    return (demo.task,) if demo.task else ()

  def answer(self, demo: Demo, text: str) -> str:
    """What makes two right responses the same answer, for counting distinct ones."""
    return " ".join(text.split())
