"""Preference data: two responses to one prompt, of which one was preferred.

    HH-RLHF   {"chosen", "rejected"}: whole dialogues as text,
              "\\n\\nHuman: ...\\n\\nAssistant: ...".
              A "prompt" that begins with "\\n\\nHuman:" is the beginning of both.
    TRL       {"prompt", "chosen", "rejected"}, each text or a list of messages; or "chosen" and
              "rejected" alone, lists of messages that begin with the prompt. A text "prompt" beside
              those must repeat the first user turn.

The last turn of the assistant is the response, and everything before it the prompt.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from dpr_jax.data.demos import Demo, Message
from dpr_jax.data.fields import present
from dpr_jax.data.formats import dialogue_problem, parse_demo
from dpr_jax.data.records import iter_records, kind_of
from dpr_jax.errors import UserError

SAME = "the two responses are the same"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two conversations that end with the assistant."""

  chosen: Demo
  rejected: Demo
  problem: str = ""  # why they are no two responses to one prompt, "" if they are.


def _spoken(text: str, where: str) -> list[Message]:
  """The turns of a dialogue of HH-RLHF, without the white space around them."""
  lead, *parts = _SPEAKER.split("\n\n" + text.lstrip())
  if lead.strip() or not parts:
    raise UserError(f"{where}: expected a dialogue that begins with 'Human:', or a field 'prompt'")
  return [{"role": _ROLES[speaker], "content": said.strip()}
          for speaker, said in zip(parts[::2], parts[1::2])]


def _side(record: Mapping[str, Any], field: str, where: str) -> Demo:
  """The conversation with one of the two responses."""
  if field not in record:
    raise UserError(f"{where}: field {field!r} is missing; found {sorted(record)}; a pair has "
                    "'chosen' and 'rejected'")
  said, prompt = record[field], record.get("prompt")
  if not isinstance(said, str | list):
    raise UserError(f"{where}: field {field!r} must be text or a list of messages, got "
                    f"{kind_of(said)}")
  given = {k: v for k, v in record.items() if k not in ("prompt", "chosen", "rejected")}
  at = f"{where}: {field}"
  begun = isinstance(prompt, str) and prompt.lstrip().startswith("Human:")
  if isinstance(said, str) and (prompt is None or begun):
    return parse_demo({**given, "messages": _spoken((prompt or "") + said, at)}, at, "messages")
  first = said[0] if isinstance(said, list) and said else None
  answers = isinstance(first, dict) and first.get("role", first.get("from")) in ("assistant", "gpt")
  if prompt is None or isinstance(prompt, str) and isinstance(said, list) and not answers:
    given |= {"messages": said} if prompt is None else {"messages": said, "prompt": prompt}
    return parse_demo(given, at, "messages")
  return parse_demo({**given, "prompt": prompt, "completion": said}, at, "prompt_response")


def _problem(chosen: Demo, rejected: Demo) -> str:
  """Why they are no two responses to one prompt."""
  if chosen.prompt != rejected.prompt:
    return "the dialogues differ before the last response"
  if chosen.messages == rejected.messages:
    return SAME
  return dialogue_problem(chosen) or dialogue_problem(rejected)


def read_pairs(path: str | pathlib.Path, limit: int = 0) -> list[Pair]:
  """The pairs of a file or a folder, one per record, also those with a problem.

  Args:
    limit: only the first so many; 0 takes all.

  Raises:
    UserError: a record of another format; names the file and line.
  """
  pairs = []
  for record, where in iter_records(path):
    record = present(record, where)
    chosen, rejected = (_side(record, field, where) for field in ("chosen", "rejected"))
    if not any(m["role"] == "user" for m in chosen.messages):
      raise UserError(f"{where}: field 'chosen' has no turn of the user, which is the prompt")
    chosen = dataclasses.replace(chosen, source=where)
    pairs.append(Pair(chosen, rejected, _problem(chosen, rejected)))
    if len(pairs) == limit:
      break
  return pairs
