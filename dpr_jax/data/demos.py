"""What a demonstration is, and how some are held out."""

import collections
import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.errors import UserError

# {"role": "system" | "user" | "assistant" | "tool", "content": text}, and what else the chat
# template reads of it (`fields.TEMPLATE_FIELDS`). A conversation with tools begins with
# {"role": "tools", "content": their descriptions, a JSON list}, so that it stays one value.
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Demo:
  """One conversation; in a demonstration the last message is the assistant's."""

  messages: tuple[Message, ...]
  answer: str | None = None  # reference for a verifier: GSM8K's after '####', else the response.
  task: str = ""  # name of the built-in task, "" for files that do not say.
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what a built-in task adds.
  source: str = ""  # "file:line" or "file[index]"; for messages, never parsed.
  ended: bool = True  # False: the last message was cut off; it gets no EOS.
  untrained: frozenset[int] = frozenset()  # assistant messages that give no loss, by index.

  @property
  def prompt(self) -> tuple[Message, ...]:
    """The messages before the last assistant turn (all of them if there is none)."""
    return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

  @property
  def response(self) -> str:
    """Text of the last assistant turn, "" if the conversation ends with another."""
    last = self.messages[-1]
    return last["content"] if last["role"] == "assistant" else ""

  @property
  def trains_last(self) -> bool:
    """Whether the last message may be imitated."""
    return len(self.messages) - 1 not in self.untrained


def as_record(messages: Sequence[Message]) -> dict[str, Any]:
  """The fields of a record that stand for a conversation."""
  if messages and messages[0]["role"] == "tools":
    return {"tools": json.loads(messages[0]["content"]), "messages": list(messages[1:])}
  return {"messages": list(messages)}


def prompt_key(demo: Demo) -> str:
  """The text by which prompts count as equal: the first user turn, case and spacing ignored.

  The first turn and not the whole prompt, because training on a dialogue trains the answer to its
  first turn too, and without the system message, which asks nothing.
  """
  return text_key(next(m["content"] for m in demo.messages if m["role"] == "user"))


def text_key(text: str) -> str:
  """The text but for case and spacing."""
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_holdout(
  demos: Sequence[Demo], holdout: int, seed: int
) -> tuple[list[Demo], list[Demo]]:
  """Splits off about `holdout` demonstrations (never more), equal prompts on one side.

  Prompts are ranked by the number of demonstrations that share them, then by a hash of (seed,
  `prompt_key`), so the split does not depend on the order of the file. The held-out part is in the
  order of ranks: a larger `holdout` only appends to it. The rest keeps the order of `demos`.

  Raises:
    UserError: `holdout` leaves nothing to train on, or one prompt fills the whole file.
  """
  if not 0 <= holdout < len(demos):
    raise UserError(f"holdout={holdout} must be at least 0 and below {len(demos)}, the number "
                    "of demonstrations")
  keys = [prompt_key(demo) for demo in demos]
  sizes = collections.Counter(keys)
  rank = {k: hashlib.blake2b(f"{seed}\0{k}".encode(), digest_size=8).digest() for k in sizes}
  held: dict[str, list[Demo]] = {}
  count = 0
  for key in sorted(sizes, key=lambda k: (sizes[k], rank[k], k)):
    count += sizes[key]
    if count > holdout:
      break
    held[key] = []
  if holdout and not held:
    raise UserError(f"holdout={holdout} is smaller than the {min(sizes.values())} "
                    "demonstrations that share one prompt")
  train = []
  for demo, key in zip(demos, keys):
    held.get(key, train).append(demo)
  return train, [demo for group in held.values() for demo in group]


def check_disjoint(train: Sequence[Demo], heldout: Sequence[Demo]) -> None:
  """Raises UserError, naming the prompt and both sources, if a held-out prompt is trained on."""
  seen = {prompt_key(demo): demo.source for demo in train}
  for demo in heldout:
    key = prompt_key(demo)
    if key in seen:
      raise UserError(
        f"{demo.source}: held-out prompt {key[:80]!r} is also a training prompt ({seen[key]})"
      )
