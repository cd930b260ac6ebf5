"""Formats of demonstration files: records -> conversations.

A demonstration is a conversation that ends with the assistant turn an expert wrote. Every reader
below yields the same `Demo`, whatever the layout of the file, and every complaint names the place:
FILE:LINE for JSON lines, FILE[INDEX] for a JSON list, Parquet or Arrow.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dpr_jax.data import fields
from dpr_jax.data.demos import Demo, Message
from dpr_jax.data.fields import text_of
from dpr_jax.data.records import iter_records, kind_of
from dpr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DemoSet:
  """What `read_demos` found in a file."""

  demos: list[Demo]
  dropped_empty: int  # records left out because a turn was empty (on_empty="drop").
  format: str  # the format that was given or detected.
  dropped_disordered: int = 0  # left out because of the order of roles (on_disorder="drop").


@dataclasses.dataclass
class _Parsed:
  """A record as its format reads it."""

  messages: list[Message]  # The last one is the assistant's if the format holds a response.
  answer: str | None = None  # a reference of the format's own.
  untrained: set[int] = dataclasses.field(default_factory=set)


# --- Turns ---------------------------------------------------------------------------------------

_ROLES = {
  "system": "system", "developer": "system", "user": "user", "human": "user",
  "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
  "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
  "ipython": "tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TURN_FIELDS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, *fields.TRAINED, *fields.TEMPLATE_FIELDS))
# What may follow what; a conversation begins as after a system message.
_FOLLOWS = {"tools": ("system", "user"), "system": ("user",), "user": ("assistant",),
            "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def _content(turn: Mapping[str, Any], field: str, where: str) -> str:
  """Content: text, or a list of {"type": "text", "text": ...} parts that are joined."""
  parts = turn.get(field)
  if parts is None and turn.get("tool_calls"):
    return ""
  if not isinstance(parts, list):
    return text_of(turn, field, where)
  for part in parts:
    if not isinstance(part, dict) or part.get("type") != "text":
      raise UserError(f"{where}: field {field!r} has a part that is not {{'type': 'text'}}")
  return "".join(text_of(part, "text", where) for part in parts)


def _function_call(content: str, where: str) -> list[dict[str, Any]]:
  """The call that a ShareGPT turn of the role function_call spells in JSON."""
  calls = fields.parsed(content, where, "a turn of the role 'function_call'")
  calls = calls if isinstance(calls, list) else [calls]
  if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
    raise UserError(f"{where}: a turn of the role 'function_call' must hold an object with a name")
  return [{"type": "function", "function": call} for call in calls]


def _turns(record, field: str, extra: Collection[str], where: str) -> _Parsed:
  turns = record.get(field)
  if not isinstance(turns, list) or not turns:
    if field not in record:
      raise UserError(f"{where}: field {field!r} is missing; found {sorted(record)}")
    raise UserError(f"{where}: field {field!r} must be a non-empty list of turns")
  parsed = _Parsed([])
  for i, turn in enumerate(turns):
    at = f"{where}: {field}[{i}]"
    if not isinstance(turn, dict):
      raise UserError(f"{at} must be an object, got {kind_of(turn)}")
    fields.check_known(turn, _TURN_FIELDS, extra, at)
    role_key = next((k for k in _ROLE_KEYS if k in turn), "from" if "value" in turn else "role")
    content_key = next((k for k in _CONTENT_KEYS if k in turn),
                       "value" if "from" in turn else "content")
    name = text_of(turn, role_key, at)
    if name not in _ROLES:
      raise UserError(f"{at}: unknown role {name!r}; known: {', '.join(_ROLES)}")
    role, content = _ROLES[name], _content(turn, content_key, at)
    said = fields.trained(turn, at)
    if said and role != "assistant":
      raise UserError(f"{at}: only turns of the assistant are trained, not those of the {role}")
    if said is False and role == "assistant":
      parsed.untrained.add(i)
    message = {"role": role, "content": content, **fields.template_fields(turn, at)}
    if name == "function_call":
      message |= {"content": "", "tool_calls": _function_call(content, at)}
    parsed.messages.append(message)
  return parsed


# --- Formats: a record -> what it says, with or without a response -------------------------------


def _from_messages(record, extra, where):
  parsed = _turns(record, "messages", extra, where)
  first = next((m["content"] for m in parsed.messages if m["role"] == "user"), None)
  if "prompt" in record and record["prompt"] != first:
    raise UserError(f"{where}: field 'prompt' is not the first user turn of 'messages'; keep one")
  return parsed


def _from_sharegpt(record, extra, where):
  return _turns(record, "conversations", extra, where)


def _reply(parsed: _Parsed, record, field: str, where: str) -> _Parsed:
  if field in record:
    parsed.messages.append({"role": "assistant", "content": text_of(record, field, where)})
  return parsed


def _from_prompt_response(record, extra, where):
  if not isinstance(record.get("prompt"), list):
    parsed = _Parsed([{"role": "user", "content": text_of(record, "prompt", where)}])
  else:  # Conversational, as TRL has it: the completion alone is trained.
    parsed = _turns(record, "prompt", extra, where)
    parsed.untrained |= {i for i, m in enumerate(parsed.messages) if m["role"] == "assistant"}
  if isinstance(record.get("completion"), list):
    completion, start = _turns(record, "completion", extra, where), len(parsed.messages)
    parsed.messages += completion.messages
    parsed.untrained |= {start + i for i in completion.untrained}
    return parsed
  if "completion" not in record and "response" not in record:
    return _reply(parsed, record, "answer", where)
  return _reply(parsed, record, "completion", where)


def _from_alpaca(record, extra, where):
  messages = []
  history = record.get("history") or []
  for pair in history if isinstance(history, list) else [history]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
      raise UserError(f"{where}: field 'history' must be a list of [user, assistant] text pairs")
    for role, text in zip(("user", "assistant"), pair):
      messages.append({"role": role, "content": text_of({"history": text}, "history", where)})
  prompt = text_of(record, "instruction", where)
  for field in ("input", "context"):
    if context := text_of(record, field, where, default=""):
      prompt = f"{prompt}\n\n{context}"
  messages.append({"role": "user", "content": prompt})
  return _reply(_Parsed(messages), record, "output", where)


_NUMBER = r"[-+]?\$?[\d.,/]*\d[\d.,/]*%?"
# <<48/2=24>>: arithmetic alone, so that <<EOF, <<interface>> and a << 8 stay.
_CALCULATOR = re.compile(r"<<[-+*/().,%$\d\s]*\d[-+*/().,%$\d\s]*=[-+*/.,%$\d\s]*\d[.,%$\d\s]*>>")
_FINAL = re.compile(rf"^####[ \t]*({_NUMBER})\s*\Z", re.MULTILINE)


def _from_question(record, extra, where):
  parsed = _Parsed([{"role": "user", "content": text_of(record, "question", where)}])
  if "answer" not in record:
    return parsed
  answer = _CALCULATOR.sub("", text_of(record, "answer", where))
  final = _FINAL.search(answer)
  parsed.answer = final[1] if final else answer
  if "response" not in record:
    parsed.messages.append({"role": "assistant", "content": answer})
  return parsed


def _is_gsm8k(record: Mapping[str, Any]) -> bool:
  return isinstance(record.get("answer"), str) and bool(_FINAL.search(record["answer"]))


@dataclasses.dataclass(frozen=True)
class _Format:
  prompt: str  # the field that holds the prompt, by which a file of prompts is recognised.
  responses: tuple[str, ...]  # one of them as well in a demonstration; () if the prompt has it.
  fields: tuple[str, ...]  # the other fields that the reader looks at.
  read: Callable
  accepts: Callable[[Mapping[str, Any]], bool] = lambda record: True

  @functools.cached_property
  def known(self) -> frozenset[str]:
    return fields.COMMON | {self.prompt, *self.responses, *self.fields}


# In the order of detection.
_FORMATS: dict[str, _Format] = {
  "messages": _Format("messages", (), ("prompt",), _from_messages),
  "sharegpt": _Format("conversations", (), (), _from_sharegpt),
  "gsm8k": _Format("question", ("answer", "response"), (), _from_question, _is_gsm8k),
  "question_answer": _Format("question", ("answer", "response"), (), _from_question),
  # "text" is the whole example again, as some copies of Alpaca have it.
  "alpaca": _Format("instruction", ("output", "response"), ("input", "context", "history", "text"),
                    _from_alpaca),
  "prompt_response": _Format("prompt", ("response", "completion", "answer"), (),
                             _from_prompt_response),
}
FORMATS = tuple(_FORMATS)


def _detect(record: Mapping[str, Any], where: str, demos: bool) -> str:
  for name, format in _FORMATS.items():
    answered = not demos or not format.responses or any(f in record for f in format.responses)
    if format.prompt in record and answered and format.accepts(record):
      return name
  raise UserError(
    f"{where}: the fields {sorted(record)} fit no known format; known: {', '.join(FORMATS)}"
  )


def _add_response(parsed: _Parsed, record: Mapping[str, Any], where: str) -> None:
  """Adds "response", as `dpr_jax.generate` writes it beside a prompt of any format."""
  if "response" not in record:
    return
  text, last = text_of(record, "response", where), parsed.messages[-1]
  generated = "hit_eos" in record or "token_ids" in record
  if last["role"] == "assistant" and generated:  # In place of the answer that was not shown.
    parsed.messages.pop()
  if parsed.messages[-1]["role"] != "assistant":
    parsed.messages.append({"role": "assistant", "content": text})
  elif last["content"] != text:
    raise UserError(f"{where}: field 'response' differs from the answer that the record already "
                    "holds; keep one")


def _parse(record, format: str, extra: Collection[str], where: str, demo: bool) -> Demo:
  """What a record says; with `demo`, it must have a response."""
  record, spec = fields.present(record, where), _FORMATS[format]
  parsed = spec.read(record, extra, where)
  fields.check_known(record, spec.known, extra, where)
  _add_response(parsed, record, where)
  if demo and spec.responses and parsed.messages[-1]["role"] != "assistant":
    text_of(record, spec.responses[0], where)  # Raises: it is missing.
  messages = fields.with_leading(fields.leading_messages(record, where), parsed.messages, where)
  moved = len(messages) - len(parsed.messages)
  untrained = {i + moved for i in parsed.untrained}
  if fields.trained(record, where) is False:
    untrained = {i for i, m in enumerate(messages) if m["role"] == "assistant"}
  answer = parsed.answer or text_of(record, "answer", where, default="") or messages[-1]["content"]
  return Demo(
    tuple(messages), answer=answer, task=text_of(record, "task", where, default=""), source=where,
    ended=fields.ended(record, where), untrained=frozenset(untrained),
  )


def _check_roles(messages: Sequence[Message], where: str, last: Sequence[str]) -> None:
  """Tools, a system message (both optional), then turns in order, ending with one of `last`."""
  roles = [m["role"] for m in messages]
  allowed = ("tools", "system", "user")
  for role in (*roles, None):
    if role is None and roles and roles[-1] in last:
      return
    if role not in allowed:
      break
    allowed = _FOLLOWS[role]
  raise UserError(
    f"{where}: roles out of order ({', '.join(roles)}); expected user and assistant in turn (and "
    "tools before the assistant goes on) after an optional system message, ending with "
    f"{' or '.join(last)}"
  )


def _empty_turn(messages: Sequence[Message]) -> str | None:
  """Role of the first user or assistant turn that says nothing, the last turn first."""
  for message in reversed(messages):
    said = message["content"].strip() or any(f in message for f in fields.TEMPLATE_FIELDS)
    if message["role"] in ("user", "assistant") and not said:
      return message["role"]
  return None


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise UserError(f"{name}={value!r} is unknown; known: {', '.join(choices)}")


def read_demos(
  path: str | pathlib.Path,
  format: str = "auto",
  limit: int = 0,
  on_empty: str = "error",
  on_disorder: str = "error",
  extra_fields: Collection[str] = (),
) -> DemoSet:
  """Reads demonstrations from a file or a folder; see `records.iter_records` for the kinds.

  Formats:
    messages: {"messages": [{"role", "content"}, ...]}, content text or a list of text parts. A
      "prompt" beside them must repeat the first user turn.
    sharegpt: {"conversations": [{"from": human | gpt | system, "value"}, ...]}, also with the
      names user | assistant and role/content.
    gsm8k: {"question", "answer"}, the answer ending in "#### N", which becomes `Demo.answer`. The
      calculator annotations `<<48/2=24>>` are removed: no person wrote them.
    question_answer: {"question", "answer"}, read in the same way, without "#### N" in the first.
    alpaca: {"instruction", "input", "output"}; a non-empty input (or "context", as Dolly has it)
      follows the instruction after a blank line. Optional "history" as [[user, assistant], ...]
      comes before.
    prompt_response: {"prompt", "response"}; "completion" or "answer" may stand for "response".
      Prompt and completion may be lists of messages; then the completion alone is trained.
    auto: decided by the first record; every later one must fit.
  In every format:
    "response" may stand for the format's own, as `dpr_jax.generate` writes it; beside "hit_eos" or
      "token_ids" it does so even where the record has an answer.
    "system" is the system message, and "tools" a list of tools that the chat template describes.
    "answer" beside the response becomes `Demo.answer`, and "task" `Demo.task`. Without a
      reference, `Demo.answer` is the last assistant content.
    "hit_eos": false says that the last assistant turn was cut off by a budget of tokens:
      `Demo.ended` is False then, and no EOS follows it.
    "weight", "train" and the like (`fields.TRAINED`), of a turn or of the record: with 0 or false,
      it gives no loss.
    A turn may have what chat templates read (`fields.TEMPLATE_FIELDS`), and the role of a tool.
    A null field counts as absent. What `fields.CARRIED` lists decides nothing; others are refused.

  Args:
    limit: stop after this many demonstrations; 0 reads all.
    on_empty: what to do with a record whose response or prompt is empty or white space: "error",
      or "drop" (counted in `DemoSet.dropped_empty`). A response that a model ended at once
      ("hit_eos": true, or "token_ids") is kept.
    on_disorder: what to do with a record whose roles are out of order, such as a dialogue that
      begins with the assistant or ends with the user: "error", or "drop" (counted).
    extra_fields: names of further fields that decide nothing; "*" stands for all.

  Raises:
    UserError: naming FILE:LINE (or FILE[INDEX]) and the field.
  """
  if format != "auto" and format not in _FORMATS:
    raise UserError(f"data format {format!r} is unknown; known: auto, {', '.join(FORMATS)}")
  _check_choice("on_empty", on_empty, ("error", "drop"))
  _check_choice("on_disorder", on_disorder, ("error", "drop"))
  if limit < 0:
    raise UserError(f"limit={limit} must be at least 0, which reads all")
  demos, empty, disordered = [], 0, 0
  for record, where in iter_records(path):
    if format == "auto":
      format = _detect(fields.present(record, where), where, demos=True)
    demo = _parse(record, format, extra_fields, where, demo=True)
    try:
      _check_roles(demo.messages, where, last=("assistant",))
    except UserError:
      if on_disorder == "error":
        raise
      disordered += 1
      continue
    generated = record.get("hit_eos") is True or record.get("token_ids") is not None
    if role := _empty_turn(demo.prompt if generated else demo.messages):
      if on_empty == "error":
        what = "response" if role == "assistant" else "prompt"
        raise UserError(f"{where}: empty {what}; expected text, or on_empty='drop' to leave it out")
      empty += 1
      continue
    demos.append(demo)
    if limit and len(demos) == limit:
      break
  if not demos:
    why = f"all {empty} records have an empty turn" if not disordered else (
      f"{empty} records have an empty turn, {disordered} have roles out of order")
    raise UserError(f"{path}: no demonstration left; {why}")
  return DemoSet(demos, empty, format, disordered)


def parse_demo(record: Mapping[str, Any], where: str, format: str) -> Demo:
  """One record of a format of `read_demos`; whether it is a dialogue, `dialogue_problem` says.

  Raises:
    UserError: as `read_demos`.
  """
  return _parse(record, format, ("*",), where, demo=True)


def dialogue_problem(demo: Demo) -> str:
  """Why `read_demos` would not take a demonstration as it is, "" if it would."""
  try:
    _check_roles(demo.messages, demo.source, last=("assistant",))
  except UserError:
    return "roles out of order"
  return "empty turn" if _empty_turn(demo.messages) else ""


def parse_prompt(record: Mapping[str, Any], where: str, format: str = "") -> Demo:
  """One record of a format of `read_demos`, with or without a response; see `read_prompts`.

  Args:
    format: "" for the one that it fits.

  Raises:
    UserError: as `read_demos`.
  """
  format = format or _detect(fields.present(record, where), where, demos=False)
  demo = _parse(record, format, ("*",), where, demo=False)
  _check_roles(demo.prompt, where, last=("user", "tool"))
  if _empty_turn(demo.prompt):
    raise UserError(f"{where}: empty prompt; expected text")
  return demo


def read_prompts(
  path: str | pathlib.Path, limit: int = 0
) -> list[tuple[tuple[Message, ...], dict[str, Any]]]:
  """Reads prompts: records of any format of `read_demos`, with or without a response.

  All fields that decide nothing are carried along.

  Returns:
    (messages ending with a user or tool turn, the whole record) per record. If the record has a
    response, it is left out of the messages, and still in the record.

  Raises:
    UserError: as `read_demos`.
  """
  if limit < 0:
    raise UserError(f"limit={limit} must be at least 0, which reads all")
  prompts, format = [], ""
  for record, where in iter_records(path):
    spec = _FORMATS.get(format)
    if spec is None or record.get(spec.prompt) is None:
      format = _detect(fields.present(record, where), where, demos=False)
    prompts.append((parse_prompt(record, where, format).prompt, record))
    if limit and len(prompts) == limit:
      break
  return prompts
