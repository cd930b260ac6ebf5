"""A chat template: what it renders, and what it writes around the content of messages."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpr_jax.data import limits
from dpr_jax.data.demos import Message
from dpr_jax.data.fields import TEMPLATE_FIELDS
from dpr_jax.data.text_ids import added_tokens, encode, protect
from dpr_jax.errors import UserError
from dpr_jax.paths import as_path, modified

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

_ASK, _REPLY, _AGAIN = "PROBE-QUESTION", "PROBE-REPLY", "PROBE-AGAIN"
_QUESTION = {"role": "user", "content": _ASK}
_ANSWER = {"role": "assistant", "content": _REPLY}
# Fields that change the conversation, so that a template has to write them.
_WRITTEN = tuple(f for f in TEMPLATE_FIELDS if f not in ("name", "tool_call_id"))
_GENERATION = re.compile(r"{%-?\s*generation\b")


@functools.lru_cache(maxsize=8)
def _read(path: str, written: float) -> str:
  del written  # Part of the cache key: an edited file is read again.
  try:
    return as_path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as e:
    raise UserError(f"chat template {path}: not UTF-8 text (byte {e.start})") from None


def _source(tokenizer, template: str) -> str | None:
  """The template's source: the file `template`, else the tokenizer's own, else None."""
  if not template:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own
  path = as_path(template)
  if not path.is_file():
    raise UserError(f"chat template {template}: no such file; expected a .jinja file, or '' for "
                    "the tokenizer's own")
  return _read(str(path), modified(path))


@functools.lru_cache(maxsize=8)
def _plain_bos(tokenizer, size: int) -> str:
  del size
  ids = tokenizer.encode("a", add_special_tokens=True)
  adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
  return tokenizer.bos_token if adds_bos else ""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
  """The template of a tokenizer, or the plain form of one that has none.

  The plain form: BOS if the tokenizer adds one itself, turns joined by "\n", EOS after each
  assistant turn.
  """

  tokenizer: "PreTrainedTokenizerFast"
  source: str | None
  size: int  # of the vocabulary, so that a token added later makes another one.

  @classmethod
  def of(cls, tokenizer, template: str = "") -> "ChatTemplate":
    """The .jinja file `template`, or the tokenizer's own for ""."""
    return _remembered(tokenizer, _source(tokenizer, template), len(tokenizer))

  # --- Rendering ---------------------------------------------------------------------------------

  def _plain(self, messages: Sequence[Message]) -> str:
    text = _plain_bos(self.tokenizer, self.size)
    for i, message in enumerate(messages):
      if message["role"] == "assistant":
        last = i == len(messages) - 1
        text += message["content"] + (self.tokenizer.eos_token or "") + ("" if last else "\n")
      elif message["role"] != "tools":
        text += message["content"] + "\n"
    return text

  def _rendered(
    self, messages, generate: bool, where: str, parts: bool
  ) -> tuple[str, list[tuple[int, int]]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = None
    if messages and messages[0]["role"] == "tools":
      tools, messages = messages[0]["content"], messages[1:]
    if parts:
      messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    limits.check_template(self.source)
    try:
      with limits.bounded(limits.TEMPLATE_SECONDS, limits.TEMPLATE_BYTES, "the chat template"):
        texts, spans = render_jinja_template(
          [list(messages)], tools=tools, chat_template=self.source, add_generation_prompt=generate,
          return_assistant_tokens_mask=self.marks, **self.tokenizer.special_tokens_map,
        )
    except jinja2.TemplateSyntaxError as e:
      raise UserError(f"the chat template is no valid Jinja: line {e.lineno}: {e.message}"
                      ) from None
    except UserError:
      raise
    except RecursionError:
      raise UserError("the chat template calls itself without an end") from None
    except Exception as e:  # A template is a program: it can raise anything.
      raise UserError(f"{where or 'conversation'}: the chat template refused it: {e}") from None
    return texts[0], spans[0] if self.marks else []

  def render(self, messages: Sequence[Message], generate: bool = False, where: str = "") -> str:
    """The text of a conversation; with `generate`, the template's generation prompt follows."""
    if self.source is None:
      return self._plain(messages)
    return self._rendered(messages, generate, where, self._parts)[0]

  def generation_spans(self, messages: Sequence[Message], where: str) -> list[tuple[int, int]]:
    """What the template marks as generated by the assistant, [start, end) in `render`'s text."""
    return self._rendered(messages, False, where, self._parts)[1]

  def prompt(self, messages: Sequence[Message], where: str = "") -> str:
    """The text after which a response to `messages` begins.

    This is the rendering with the generation prompt, but where the template begins an answered turn
    in another way (it has no generation prompt, or one that opens a thought which answers lack):
    there it ends with what the template writes in an answered turn.
    """
    cut, header = self._opening
    return self.render(messages, True, where).removesuffix(cut) + header

  def protected(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with the tokens that they spell marked as text; see `text_ids`."""
    out = []
    for message in messages:
      if message["role"] == "tools":
        message = {**message, "content": json.loads(message["content"])}
      written = self.turn_tokens if message["role"] == "assistant" else self.written_tokens
      out.append({k: v if k == "role" else protect(v, self.tokenizer, written)
                  for k, v in message.items()})
    return out

  # --- What it writes ----------------------------------------------------------------------------

  @functools.cached_property
  def marks(self) -> bool:
    """Whether the template marks what the assistant generates, by {% generation %}."""
    return self.source is not None and bool(_GENERATION.search(self.source))

  @functools.cached_property
  def _parts(self) -> bool:
    """Whether it reads content as a list of parts only, as those of multimodal models may."""
    def writes(parts: bool) -> bool:
      try:
        text = self._rendered([_QUESTION, _ANSWER], False, "", parts)[0]
      except UserError:
        return False
      return _ASK in text and _REPLY in text
    return not writes(False) and writes(True)

  @functools.cached_property
  def _seen(self) -> set[str]:
    return set()  # What the template was seen to write; see `check_written`.

  @functools.cached_property
  def _opening(self) -> tuple[str, str]:
    """What to cut from the end of a rendering with generation prompt, and what to add."""
    asked, answered = self.render([_QUESTION], True), self.render([_QUESTION, _ANSWER])
    if _ASK not in answered or _REPLY not in answered:
      raise UserError("the chat template does not write the text of messages; pass one for text")
    before = answered.partition(_REPLY)[0]
    bare = os.path.commonprefix([self.render([_QUESTION]), asked])
    if not before.startswith(asked):
      common = os.path.commonprefix([before, asked])
      return (asked[len(common) :], "") if len(common) > len(bare) else ("", "")
    # Without a generation prompt, the header is the prompt's; a space belongs to the first word.
    header = before[len(asked) :].rstrip(" ") if asked == bare else ""
    return "", header if header.strip() else ""

  @functools.cached_property
  def ends(self) -> tuple[int, ...]:
    """Ids that end an assistant turn: the EOS, then the token that the template writes there."""
    ids = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
    if self.source is None:
      return tuple(ids)
    tail = self.render([_QUESTION, _ANSWER]).rpartition(_REPLY)[2].lstrip()
    first, known = encode(tail, self.tokenizer)[:1], added_tokens(tail, self.tokenizer)
    if first and first[0] not in ids and first == known[:1]:
      ids += first
    return tuple(ids)

  def _tokens(self, *texts: str) -> frozenset[str]:
    ids = {i for text in texts for i in added_tokens(text, self.tokenizer)}
    return frozenset(t for t in map(self.tokenizer.convert_ids_to_tokens, ids) if t.strip())

  @functools.cached_property
  def turn_tokens(self) -> frozenset[str]:
    """Added tokens, special or not, that the template writes before and after messages."""
    if self.source is None:
      return frozenset()
    text = self.render([_QUESTION, _ANSWER, {"role": "user", "content": _AGAIN}])
    before, _, rest = text.partition(_ASK)
    after, _, end = rest.partition(_REPLY)[2].partition(_AGAIN)
    return self._tokens(before, after, end)

  @functools.cached_property
  def written_tokens(self) -> frozenset[str]:
    """`turn_tokens`, and those of an answer's opening, such as one that begins a thought."""
    if self.source is None:
      return frozenset()
    return self.turn_tokens | self._tokens(self.render([_QUESTION], True).partition(_ASK)[2])

  def check_written(self, messages: Sequence[Message], where: str) -> None:
    """Refuses what the template would pass over: system and tool messages, tools, and fields.

    Raises:
      UserError: naming the role or field.
    """
    for i, message in enumerate(messages):
      role = message["role"]
      parts = [role] if role in ("tools", "system", "tool") else []
      if role == "system" and not message["content"].strip():
        continue
      for part in [*parts, *(f for f in _WRITTEN if f in message)]:
        if part in self._seen:
          continue
        if part == "tools":
          other = []
        elif part in parts:
          other = [{**message, "content": message["content"] + _REPLY}]
        else:
          other = [{k: v for k, v in message.items() if k != part}]
        # To the first question, without which templates refuse.
        end = next((j for j in range(i, len(messages)) if messages[j]["role"] == "user"), i)
        end = (end if role in ("tools", "system") else i) + 1
        changed = [*messages[:i], *other, *messages[i + 1 : end]]
        if self.render(messages[:end], False, where) == self.render(changed, False, where):
          what = f"messages of the role {part!r}" if part in ("system", "tool") else (
            f"field {part!r}")
          raise UserError(f"{where or 'conversation'}: the chat template writes nothing of {what}; "
                          "take it out, or pass a template that has it")
        self._seen.add(part)


@functools.lru_cache(maxsize=8)
def _remembered(tokenizer, source: str | None, size: int) -> ChatTemplate:
  return ChatTemplate(tokenizer, source, size)
