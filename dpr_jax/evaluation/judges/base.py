"""What a judge is: it answers questions about responses, or gives conversations a reward.

A file of this package, or of a user (`--judge=my_file.py:Mine`), declares one:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Brevity(Judge):
      rewards = True

      def replies(self, questions, setting):
        for i, question in enumerate(questions):
          yield i, {"reward": -len(question.messages[-1]["content"])}
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from dpr_jax import fingerprints
from dpr_jax.config.fields import Value
from dpr_jax.config.values import to_json
from dpr_jax.data.demos import Message


@dataclasses.dataclass(frozen=True)
class Question:
  """One thing that a judge is asked."""

  part: str  # names it among those about one response.
  messages: tuple[Message, ...]  # what a judge is told; with `rewards`, what it gives a reward.
  max_tokens: int = 2048  # of the reply.
  top_logprobs: int = 0  # how many log-probs of the first token of the reply are wanted.
  # Of the last message, in the tokenizer of `Setting`, where exactly these are to be judged.
  token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
  """Where a judge works."""

  stopping: Callable[[], bool]  # whether to ask no more, and to yield what is under way.
  fresh: bool = True  # whether no reply is known yet.
  mesh: Any = None
  dtype: str = "float32"
  batch_size: int = 8
  # Of the model that wrote what is judged, where questions have token ids.
  tokenizer: Any = None
  template: str = ""


class Judge(Value):
  """A frozen dataclass; its fields are its settings."""

  rewards: ClassVar[bool] = False  # gives a conversation a number, instead of answering in words.
  everywhere: ClassVar[bool] = False  # every process of a run must take part; else process 0 asks.

  def prepare(self) -> None:
    """Raises UserError, before anything is generated, where it could not judge."""

  def identity(self) -> Any:
    """What decides its replies besides the question, as JSON."""
    module = type(self).__module__
    own = "" if module.startswith("dpr_jax.") else inspect.getsourcefile(type(self))
    return [to_json(self), own and fingerprints.of_file(own)]

  def key(self, question: Question) -> str:
    """Names a question in judgments.jsonl; the reply to an equal one is not asked for again."""
    asked = dataclasses.asdict(dataclasses.replace(question, part=""))
    return fingerprints.of_bytes(repr([self.identity(), asked]).encode())

  def replies(
      self, questions: Sequence[Question], setting: Setting
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index of a question, reply), in any order, each as soon as it is known.

    A reply is JSON: {"reward": a number, or None for a conversation that cannot be scored}, or
    {"text"} with "logprobs" (token -> nats, of the first token), "tokens_in" and "tokens_out",
    where they are known.

    Raises:
      UserError: it cannot go on. What it has yielded is kept.
    """
    raise NotImplementedError
