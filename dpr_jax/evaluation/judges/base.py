"""What a judge is: it answers questions about responses, or gives conversations a reward.

A file of this package, or of a user (`--judge=my_file.py:Mine`), declares one. Those that give
rewards serve judged benchmarks, `generate --best_of` and DPR, as its `verifier`.

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


Replies = Iterator[tuple[int, dict[str, Any]]]


class Judge(Value):
  """A frozen dataclass; its fields are its settings."""

  rewards: ClassVar[bool] = False  # gives a conversation a number, instead of answering in words.
  everywhere: ClassVar[bool] = False  # every process of a run must take part; else process 0 asks.

  def check(self, config: Any) -> None:
    """Raises ValueError where its fields are wrong.

    Args:
      config: a `RunConfig` that it is part of; None outside of a run.
    """

  def prepare(self, tokenizer: Any = None) -> None:
    """Raises UserError, before anything is generated, where it could not judge.

    Args:
      tokenizer: of the model that writes what is judged, where it is known.
    """

  def identity(self) -> dict[str, Any]:
    """What decides its replies besides the question, as JSON; a run that goes on must find it."""
    module = type(self).__module__
    own = "" if module.startswith("dpr_jax.") else inspect.getsourcefile(type(self))
    return {"settings": to_json(self), "source": own and fingerprints.of_file(own)}

  def held(self, mesh: Any, dtype: str) -> Any:
    """A tree of ShapeDtypeStructs: the weights that `open` loads, for planning."""
    return ()

  def key(self, question: Question) -> str:
    """Names a question in judgments.jsonl; the reply to an equal one is not asked for again."""
    asked = dataclasses.asdict(dataclasses.replace(question, part=""))
    return fingerprints.of_bytes(repr([self.identity(), asked]).encode())

  def open(self, setting: Setting) -> Callable[[Sequence[Question]], Replies]:
    """`replies` of this setting; a judge that is a model loads it here, once for all calls."""
    return lambda questions: self.replies(questions, setting)

  def replies(self, questions: Sequence[Question], setting: Setting) -> Replies:
    """Yields (index of a question, reply), in any order, each as soon as it is known.

    A reply is JSON: {"reward": a number, or None for a conversation that cannot be scored}, or
    {"text"} with "logprobs" (token -> nats, of the first token), "tokens_in" and "tokens_out",
    where they are known.

    Raises:
      UserError: it cannot go on. What it has yielded is kept.
    """
    raise NotImplementedError
