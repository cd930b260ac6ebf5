"""Demonstration files -> conversations.

A demonstration is a conversation that ends with the assistant turn an expert
wrote. Every reader below yields the same `Demo`, whatever the layout of the
file, and every complaint names the place: FILE:LINE for JSON lines,
FILE[INDEX] for a JSON list or Parquet.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dpr_jax.data.limits import parse_json
from dpr_jax.errors import UserError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True)
class Demo:
  """One conversation; in a demonstration the last message is the assistant's."""

  messages: tuple[Message, ...]
  answer: str | None = None  # reference for a verifier: GSM8K's after '####', else the response.
  task: str = ""  # name of the built-in task, "" for files that do not say.
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what a built-in task adds.
  source: str = ""  # "file:line" or "file[index]"; for messages, never parsed.
  ended: bool = True  # False: the last message was cut off; it gets no EOS.

  @property
  def prompt(self) -> tuple[Message, ...]:
    """The messages before the last assistant turn (all of them if there is none)."""
    return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

  @property
  def response(self) -> str:
    """Text of the last assistant turn, "" if the conversation ends with the user."""
    last = self.messages[-1]
    return last["content"] if last["role"] == "assistant" else ""


@dataclasses.dataclass(frozen=True)
class DemoSet:
  """What `read_demos` found in a file."""

  demos: list[Demo]
  dropped_empty: int  # records left out because a turn was empty (on_empty="drop").
  format: str  # the format that was given or detected.


# --- Records: one mapping each, with the place it came from -------------------------------------


def iter_records(path: str | pathlib.Path) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (record, source) from JSON lines, a JSON list (sniffed by content) or Parquet.

  Raises:
    UserError: no such file, unknown suffix, empty, not UTF-8, malformed JSON, or an item that is
      not an object.
  """
  path = pathlib.Path(path)
  try:
    found = path.is_file()
  except OSError:  # A name that is too long.
    found = False
  if not found:
    raise UserError(f"{str(path)[:300]}: no such file; expected .jsonl, .json or .parquet")
  if path.suffix == ".parquet":
    records = _iter_parquet(path)
  elif path.suffix in (".jsonl", ".json"):
    records = _iter_json(path)
  else:
    raise UserError(f"{path}: unknown suffix {path.suffix!r}; expected .jsonl, .json or .parquet")
  empty = True
  for record, source in records:
    empty = False
    if not isinstance(record, dict):
      raise UserError(f"{source}: expected a JSON object, got {_kind(record)}")
    yield record, source
  if empty:
    raise UserError(f"{path}: empty file; expected at least one record")


def _iter_json(path: pathlib.Path) -> Iterator[tuple[Any, str]]:
  try:
    text = path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise UserError(f"{path}: not UTF-8 text (byte {e.start}); expected JSON") from None
  if text.lstrip()[:1] == "[":
    try:
      records = parse_json(text, str(path))
    except json.JSONDecodeError as e:
      raise UserError(f"{path}:{e.lineno}: malformed JSON at column {e.colno}: {e.msg}") from None
    yield from ((record, f"{path}[{i}]") for i, record in enumerate(records))
    return
  # Not splitlines(): it also breaks at U+2028 and friends, which JSON strings may hold raw.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    try:
      yield parse_json(line, f"{path}:{number}"), f"{path}:{number}"
    except json.JSONDecodeError as e:
      raise UserError(
        f"{path}:{number}: malformed JSON at column {e.colno}: {e.msg}; expected one JSON object "
        "a line, or one JSON list"
      ) from None


def _iter_parquet(path: pathlib.Path) -> Iterator[tuple[Any, str]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise UserError(f"{path}: Parquet needs pyarrow: pip install -e '.[parquet]'") from None
  try:
    file = pyarrow.parquet.ParquetFile(path)
    index = 0
    for batch in file.iter_batches(batch_size=4096):
      yield from ((record, f"{path}[{i}]") for i, record in enumerate(batch.to_pylist(), index))
      index += batch.num_rows
  except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as e:
    # A damaged page, text that is not UTF-8, or a date that Python does not have.
    raise UserError(f"{path}: not a readable Parquet file: {e}") from None


# --- Formats: a record -> (messages, reference answer or None) ----------------------------------

_ROLES = {
  "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape one; no tokenizer can encode it.


def _kind(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
  return names.get(type(value), "a number")


def _text(record: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
  """The text of a field; `default`, where given, stands for an absent or null field."""
  value = record.get(field)
  if value is None and default is not None:
    return default
  if field not in record:
    raise UserError(f"{where}: field {field!r} is missing; found {sorted(record)}")
  if not isinstance(value, str):
    raise UserError(f"{where}: field {field!r} must be text, got {_kind(value)}")
  if not value.isascii() and (half := _SURROGATE.search(value)):
    raise UserError(f"{where}: field {field!r} holds a lone surrogate (\\u{ord(half[0]):04x}), "
                    "half of a character; expected Unicode text")
  return value


def _content(message: Mapping[str, Any], field: str, where: str) -> str:
  """Message content: text, or a list of {"type": "text", "text": ...} parts that are joined."""
  parts = message.get(field)
  if not isinstance(parts, list):
    return _text(message, field, where)
  for part in parts:
    if not isinstance(part, dict) or part.get("type") != "text":
      raise UserError(f"{where}: field {field!r} has a part that is not {{'type': 'text'}}")
  return "".join(_text(part, "text", where) for part in parts)


def _turns(record, field: str, role_keys: Sequence[str], content_keys: Sequence[str], where: str):
  turns = record.get(field)
  if not isinstance(turns, list) or not turns:
    if field not in record:
      raise UserError(f"{where}: field {field!r} is missing; found {sorted(record)}")
    raise UserError(f"{where}: field {field!r} must be a non-empty list of turns")
  messages = []
  for i, turn in enumerate(turns):
    at = f"{where}: {field}[{i}]"
    if not isinstance(turn, dict):
      raise UserError(f"{at} must be an object, got {_kind(turn)}")
    role_key = next((k for k in role_keys if k in turn), role_keys[0])
    content_key = next((k for k in content_keys if k in turn), content_keys[0])
    role = _text(turn, role_key, at)
    if role not in _ROLES:
      raise UserError(f"{at}: unknown role {role!r}; known: {', '.join(_ROLES)}")
    messages.append({"role": _ROLES[role], "content": _content(turn, content_key, at)})
  return messages


def _ended(record: Mapping[str, Any], where: str) -> bool:
  """Whether the response came to its end: "hit_eos", which `dpr_jax.generate` writes."""
  value = record.get("hit_eos")
  if value is not None and not isinstance(value, bool):
    raise UserError(f"{where}: field 'hit_eos' must be true or false, got {_kind(value)}")
  return value is not False


def _from_messages(record, where):
  messages = _turns(record, "messages", ("role",), ("content",), where)
  return messages, _text(record, "answer", where, default="") or None


def _from_sharegpt(record, where):
  messages = _turns(record, "conversations", ("from", "role"), ("value", "content"), where)
  system = _text(record, "system", where, default="")
  if system and messages[0]["role"] != "system":
    messages.insert(0, {"role": "system", "content": system})
  return messages, _text(record, "answer", where, default="") or None


def _from_prompt_response(record, where):
  field = next((f for f in ("response", "completion", "answer") if f in record), "response")
  messages = [
    {"role": "user", "content": _text(record, "prompt", where)},
    {"role": "assistant", "content": _text(record, field, where)},
  ]
  return messages, _text(record, "answer", where, default="") or None


def _from_alpaca(record, where):
  messages = []
  if system := _text(record, "system", where, default=""):
    messages.append({"role": "system", "content": system})
  history = record.get("history") or []
  for pair in history if isinstance(history, list) else [history]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
      raise UserError(f"{where}: field 'history' must be a list of [user, assistant] text pairs")
    for role, text in zip(("user", "assistant"), pair):
      messages.append({"role": role, "content": _text({"history": text}, "history", where)})
  prompt = _text(record, "instruction", where)
  if context := _text(record, "input", where, default=""):
    prompt = f"{prompt}\n\n{context}"
  messages.append({"role": "user", "content": prompt})
  messages.append({"role": "assistant", "content": _text(record, "output", where)})
  return messages, None


def _from_gsm8k(record, where):
  answer = _CALCULATOR.sub("", _text(record, "answer", where))
  messages = [
    {"role": "user", "content": _text(record, "question", where)},
    {"role": "assistant", "content": answer},
  ]
  _, found, final = answer.rpartition("####")
  return messages, final.strip() if found else None


# In the order of detection: the fields that identify a format, and its reader.
_FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable]] = {
  "messages": ((("messages",),), _from_messages),
  "sharegpt": ((("conversations",),), _from_sharegpt),
  "gsm8k": ((("question", "answer"),), _from_gsm8k),
  "alpaca": ((("instruction", "output"),), _from_alpaca),
  "prompt_response": (
    (("prompt", "response"), ("prompt", "completion"), ("prompt", "answer")),
    _from_prompt_response,
  ),
}
FORMATS = tuple(_FORMATS)


def _detect(record: Mapping[str, Any], where: str) -> str:
  for name, (signatures, _) in _FORMATS.items():
    if any(all(field in record for field in fields) for fields in signatures):
      return name
  raise UserError(
    f"{where}: the fields {sorted(record)} fit no known format; known: {', '.join(FORMATS)}"
  )


def _check_roles(messages: Sequence[Message], where: str, last: str) -> None:
  """An optional system message, then user and assistant in turn, ending with `last`."""
  roles = [m["role"] for m in messages]
  turns = roles[1:] if roles and roles[0] == "system" else roles
  expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
  if turns != expected or not turns or turns[-1] != last:
    raise UserError(
      f"{where}: roles out of order ({', '.join(roles)}); expected user and assistant in turn "
      f"after an optional system message, ending with {last}"
    )


def _empty_turn(messages: Sequence[Message]) -> str | None:
  """Role of the first user or assistant turn without text, the last turn first."""
  for message in reversed(messages):
    if message["role"] != "system" and not message["content"].strip():
      return message["role"]
  return None


def read_demos(
  path: str | pathlib.Path, format: str = "auto", limit: int = 0, on_empty: str = "error"
) -> DemoSet:
  """Reads demonstrations from .jsonl, .json (a list or JSON lines) or .parquet.

  Formats:
    messages: {"messages": [{"role", "content"}, ...]}, content text or a list of text parts.
    sharegpt: {"conversations": [{"from": human | gpt | system, "value"}, ...]}, also with the
      names user | assistant and role/content; an optional "system" field.
    gsm8k: {"question", "answer"}. The calculator annotations `<<48/2=24>>` are removed: no person
      wrote them. The closing line "#### N" stays, and N becomes `Demo.answer`.
    alpaca: {"instruction", "input", "output"}; a non-empty input follows the instruction after a
      blank line. Optional "system", and "history" as [[user, assistant], ...], come before.
    prompt_response: {"prompt", "response"}; "completion" or "answer" may stand for "response".
    auto: decided by the first record; every later one must fit.
  An "answer" beside the response (messages, sharegpt, prompt_response) becomes `Demo.answer`, and
  a "task" becomes `Demo.task`. Without a reference, `Demo.answer` is the last assistant content.
  "hit_eos": false, as `dpr_jax.generate` writes it, says that the last assistant turn was cut off
  by a budget of tokens: `Demo.ended` is False then, and no EOS follows it.

  Args:
    limit: stop after this many demonstrations; 0 reads all.
    on_empty: what to do with a record whose response or prompt is empty or white space: "error",
      or "drop" (counted in `DemoSet.dropped_empty`).

  Raises:
    UserError: naming FILE:LINE (or FILE[INDEX]) and the field.
  """
  if format != "auto" and format not in _FORMATS:
    raise UserError(f"data format {format!r} is unknown; known: auto, {', '.join(FORMATS)}")
  if on_empty not in ("error", "drop"):
    raise UserError(f"on_empty={on_empty!r} is unknown; known: error, drop")
  if limit < 0:
    raise UserError(f"limit={limit} must be at least 0, which reads all")
  demos, dropped = [], 0
  for record, where in iter_records(path):
    if format == "auto":
      format = _detect(record, where)
    messages, answer = _FORMATS[format][1](record, where)
    _check_roles(messages, where, last="assistant")
    if role := _empty_turn(messages):
      if on_empty == "error":
        what = "response" if role == "assistant" else "prompt"
        raise UserError(f"{where}: empty {what}; expected text, or on_empty='drop' to leave it out")
      dropped += 1
      continue
    if answer is None:
      answer = messages[-1]["content"]
    task = _text(record, "task", where, default="")
    ended = _ended(record, where)
    demos.append(Demo(tuple(messages), answer=answer, task=task, source=where, ended=ended))
    if limit and len(demos) == limit:
      break
  if not demos:
    raise UserError(f"{path}: no demonstration left; all {dropped} records have an empty turn")
  return DemoSet(demos=demos, dropped_empty=dropped, format=format)


def read_prompts(
  path: str | pathlib.Path, limit: int = 0
) -> list[tuple[tuple[Message, ...], dict[str, Any]]]:
  """Reads prompts: records {"prompt": str}, with or without "response", or {"messages": [...]}.

  Returns:
    (messages ending with a user turn, the whole record) per record. If "messages" ends with an
    assistant turn, that turn is left out: it is the response, and still in the record.

  Raises:
    UserError: as `read_demos`.
  """
  if limit < 0:
    raise UserError(f"limit={limit} must be at least 0, which reads all")
  prompts = []
  for record, where in iter_records(path):
    if "messages" in record:
      messages = _turns(record, "messages", ("role",), ("content",), where)
      if messages[-1]["role"] == "assistant":
        messages.pop()
    elif "prompt" in record:
      messages = [{"role": "user", "content": _text(record, "prompt", where)}]
    else:
      raise UserError(f"{where}: field 'prompt' or 'messages' is missing; found {sorted(record)}")
    _check_roles(messages, where, last="user")
    if _empty_turn(messages):
      raise UserError(f"{where}: empty prompt; expected text")
    prompts.append((tuple(messages), record))
    if limit and len(prompts) == limit:
      break
  return prompts


# --- Holding out ---------------------------------------------------------------------------------


def prompt_key(demo: Demo) -> str:
  """The text by which prompts count as equal: the first user turn, case and spacing ignored.

  The first turn and not the whole prompt, because training on a dialogue trains the answer to its
  first turn too, and without the system message, which asks nothing.
  """
  first = next(m["content"] for m in demo.messages if m["role"] == "user")
  return " ".join(unicodedata.normalize("NFKC", first).casefold().split())


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
