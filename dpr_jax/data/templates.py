"""Conversation -> token ids and loss mask.

The chat template alone decides what surrounds the text, special tokens
included; nothing is added to what it renders except an EOS where it writes
none. Prompt and response are tokenised apart, exactly where generation starts,
so that training sees the ids that sampling will see. Masks follow from this
split and never from ids: the pad token of many models is their EOS.

A message that spells a special token ("<|im_end|>") gets the ids of that text
and not the token, so no user can close a turn or open one.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpr_jax.data import limits
from dpr_jax.data.formats import Demo, Message
from dpr_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# Brackets around the number of a special token spelled in a message. They are noncharacters,
# which no text may hold; one that does is numbered as well.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclasses.dataclass(frozen=True)
class Example:
  """One tokenised conversation of T tokens."""

  tokens: np.ndarray  # int32 [T]
  loss_mask: np.ndarray  # float32 [T], 1 where the token is trained (response tokens and EOS).
  source: str = ""  # where it came from, for messages.


# --- Text -> ids ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _specials(tokenizer, size: int) -> tuple[tuple[str, ...], frozenset[int], re.Pattern]:
  """Strings to number, ids of special tokens, and the pattern that finds the strings."""
  del size  # Part of the cache key: a token added later changes it.
  ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  ids |= set(tokenizer.all_special_ids)
  strings = {tokenizer.convert_ids_to_tokens(i) for i in ids} | {_OPEN, _CLOSE}
  # Longest first, so that a token which begins another does not win.
  strings = tuple(sorted(strings, key=lambda s: (-len(s), s)))
  return strings, frozenset(ids), re.compile("|".join(map(re.escape, strings)))


def _protect(text: str, tokenizer) -> str:
  """Replaces special-token strings by marks that survive rendering; see `_encode`."""
  strings, _, pattern = _specials(tokenizer, len(tokenizer))
  return pattern.sub(lambda m: f"{_OPEN}{strings.index(m[0])}{_CLOSE}", text)


def _encode_inside(text: str, tokenizer, split_special_tokens: bool) -> list[int]:
  """Ids of text that does not begin a text, so that SentencePiece puts no space before it."""
  encode = functools.partial(
    tokenizer.encode, add_special_tokens=False, split_special_tokens=split_special_tokens)
  head, both = encode(_OPEN), encode(_OPEN + text)  # A noncharacter: no token joins it.
  return both[len(head) :] if both[: len(head)] == head else encode(text)


def _encode(text: str, tokenizer) -> list[int]:
  """Ids of rendered text: its special tokens parsed, marked strings as the text they are."""
  if _OPEN not in text:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
  strings, special_ids, _ = _specials(tokenizer, len(tokenizer))
  ids = []
  for i, piece in enumerate(_MARK.split(text)):
    if i % 2:
      literal = strings[int(piece)]
      new = _encode_inside(literal, tokenizer, split_special_tokens=True)
      if special_ids.intersection(new):
        raise UserError(f"a message contains {literal!r}, which this tokenizer cannot write as "
                        "text; take it out of the message")
      ids += new
    elif i and piece:
      ids += _encode_inside(piece, tokenizer, split_special_tokens=False)
    elif piece:
      ids += tokenizer.encode(piece, add_special_tokens=False)
  return ids


def _encode_after(prefix: str, text: str, tokenizer) -> list[int]:
  """Ids of `text` where it continues `prefix`, whose own ids stay as they are.

  SentencePiece-like tokenizers put a space before whatever they take for the beginning of a text.
  So `text` is tokenised behind its prefix and the prefix's ids are cut off, unless a merge across
  the border changed them; then `text` is tokenised alone.
  """
  if not text:
    return []
  if prefix:
    head, both = _encode(prefix, tokenizer), _encode(prefix + text, tokenizer)
    if both[: len(head)] == head:
      return both[len(head) :]
  return _encode(text, tokenizer)


# --- Rendering -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _read_template(path: str, mtime_ns: int) -> str:
  del mtime_ns  # Part of the cache key: an edited file is read again.
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as e:
    raise UserError(f"chat template {path}: not UTF-8 text (byte {e.start})") from None


def _template_text(tokenizer, template: str) -> str | None:
  """The template's source: the file `template`, else the tokenizer's own, else None."""
  if not template:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own
  path = pathlib.Path(template)
  if not path.is_file():
    raise UserError(f"chat template {template}: no such file; expected a .jinja file, or '' for "
                    "the tokenizer's own")
  return _read_template(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _plain_bos(tokenizer, size: int) -> str:
  del size
  ids = tokenizer.encode("a", add_special_tokens=True)
  adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
  return tokenizer.bos_token if adds_bos else ""


def _render_plain(messages: Sequence[Message], tokenizer) -> str:
  """[BOS if the tokenizer adds one] turn "\n" turn "\n" ..., EOS after each assistant turn."""
  text = _plain_bos(tokenizer, len(tokenizer))
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      last = i == len(messages) - 1
      text += message["content"] + (tokenizer.eos_token or "") + ("" if last else "\n")
    else:
      text += message["content"] + "\n"
  return text


def _render(messages, tokenizer, template: str | None, generate: bool, where: str) -> str:
  if template is None:
    return _render_plain(messages, tokenizer)
  import jinja2

  limits.check_template(template)
  try:
    with limits.time_limit(limits.TEMPLATE_SECONDS, "the chat template"):
      return tokenizer.apply_chat_template(
        list(messages), chat_template=template, add_generation_prompt=generate, tokenize=False,
        return_dict=False,
      )
  except jinja2.TemplateSyntaxError as e:
    raise UserError(f"the chat template is no valid Jinja: line {e.lineno}: {e.message}") from None
  except UserError:
    raise
  except RecursionError:
    raise UserError("the chat template calls itself without an end") from None
  except Exception as e:  # A template is a program: it can raise anything.
    raise UserError(f"{where or 'conversation'}: the chat template refused it: {e}") from None


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer, template: str | None, eos_id: int | None) -> tuple[int, ...]:
  """Ids that end an assistant turn: the EOS, then what the template writes there."""
  ids = [] if eos_id is None else [eos_id]
  if template is None:
    return tuple(ids)
  probe = "PROBE-REPLY"
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": probe}]
  tail = _render(messages, tokenizer, template, False, "").rpartition(probe)[2].lstrip()
  first = _encode(tail, tokenizer)[:1]
  if first and first[0] not in ids and first[0] in _specials(tokenizer, len(tokenizer))[1]:
    ids += first
  return tuple(ids)


def stop_ids(
  tokenizer: "PreTrainedTokenizerFast", generation_config: Any = None, template: str = ""
) -> tuple[int, ...]:
  """Ids that end a response, the tokenizer's EOS first.

  These are `tokenizer.eos_token_id`, the special token that the chat template writes at the end of
  an assistant turn (<|im_end|>, <end_of_turn>, <|eot_id|>), and `eos_token_id` (an int or a list)
  of `generation_config`, an object or a dict.

  Raises:
    UserError: there is none; generation would never stop.
  """
  ids = list(_turn_end(tokenizer, _template_text(tokenizer, template), tokenizer.eos_token_id))
  if generation_config is not None:
    get = generation_config.get if isinstance(generation_config, dict) else (
      lambda name: getattr(generation_config, name, None))
    extra = get("eos_token_id")
    extra = [] if extra is None else extra if isinstance(extra, list | tuple) else [extra]
    if bad := [i for i in extra if type(i) is not int or not 0 <= i < 2**31]:
      raise UserError(f"eos_token_id={bad[0]!r} of the model's generation config must be a token "
                      "id, or a list of them")
    ids += extra
  if not ids:
    raise UserError("the tokenizer defines no eos_token and its chat template ends a turn without "
                    "a special token; set eos_token in tokenizer_config.json")
  return tuple(dict.fromkeys(ids))


# --- Conversations -------------------------------------------------------------------------------


def _without_closing(response: str, before: Sequence[Message], render) -> str:
  """What a template rendered of an answer to `before`, less what it writes after the content."""
  probe = "PROBE-REPLY"
  closed = render([*before, {"role": "assistant", "content": probe}])
  return response.removesuffix(closed.rpartition(probe)[2])


def _encode_turns(
  messages: Sequence[Message], tokenizer, template: str, where: str, ended: bool = True
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
  """Splits a conversation where generation would start and stop.

  Args:
    ended: False if the last message, the assistant's, was cut off.

  Returns:
    One (prompt ids, response ids) per assistant turn, the response ending in a stop id unless it
    was cut off, and the ids that follow: the open prompt if the last message is the user's, else
    none.
  """
  jinja = _template_text(tokenizer, template)
  ends = stop_ids(tokenizer, template=template)
  messages = [{"role": m["role"], "content": _protect(m["content"], tokenizer)} for m in messages]
  turns, done, context = [], "", ""  # Rendered so far; the last piece of it, to tokenise behind.
  rest_text, rest_ids = "", []  # What the template wrote between the last EOS and the next turn.

  def prompt_piece(before):
    """Ids of everything from the last response to the start of the next one, and its rendering."""
    prompt = _render(before, tokenizer, jinja, True, where)
    if not prompt.startswith(done):
      raise UserError(
        f"{where or 'conversation'}: the chat template rewrites earlier turns (message "
        f"{len(before)}), so several turns cannot be trained as one sequence; pass a template that "
        "only appends"
      )
    piece = rest_text + prompt[len(done) :]
    return rest_ids + _encode_after(context, piece, tokenizer), piece, prompt

  for i, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    prompt_ids, piece, prompt = prompt_piece(messages[:i])
    done = _render(messages[: i + 1], tokenizer, jinja, False, where)
    if not done.startswith(prompt):
      raise UserError(
        f"{where or 'conversation'}: the chat template's generation prompt is no prefix of the "
        f"answered turn (message {i + 1}); pass a template whose assistant turn begins with it"
      )
    response = done[len(prompt) :]
    if not ended and i == len(messages) - 1:
      # Without anything that the template writes to close the turn.
      render = lambda turns: _render(turns, tokenizer, jinja, False, where)
      response_ids = _encode_after(
        piece, _without_closing(response, messages[:i], render), tokenizer
      )
      if any(token in ends for token in response_ids):
        raise UserError(f"{where or 'conversation'}: the text of a response that was cut off "
                        "(hit_eos is false) holds a token that ends a response")
      turns.append((prompt_ids, response_ids))
      if not response_ids:
        raise UserError(f"{where or 'conversation'}: a response that was cut off (hit_eos is "
                        "false) must have a token; leave it out")
      break
    response_ids = _encode_after(piece, response, tokenizer)
    end = next((j for j, token in enumerate(response_ids) if token in ends), None)
    if end is not None:
      rest_text, rest_ids = "", response_ids[end + 1 :]
      response_ids = response_ids[: end + 1]
    else:  # The template closes the turn with plain text: the EOS goes where the content ends.
      if tokenizer.eos_token_id is None:
        raise UserError(f"{where or 'conversation'}: the tokenizer defines no eos_token to end the "
                        "response; set it in tokenizer_config.json")
      content = message["content"]
      content = content if content in response else content.strip()
      cut = response.rfind(content) + len(content) if content in response else len(response)
      rest_text, rest_ids = response[cut:], []
      response = response[:cut]
      response_ids = _encode_after(piece, response, tokenizer) + [tokenizer.eos_token_id]
    turns.append((prompt_ids, response_ids))
    context = response
  if messages and messages[-1]["role"] == "assistant":
    return turns, []
  return turns, prompt_piece(messages)[0]


def render_prompt(
  messages: Sequence[Message],
  tokenizer: "PreTrainedTokenizerFast",
  template: str = "",
  source: str = "",
) -> np.ndarray:
  """Ids of a prompt with its generation prompt, ready to be continued; int32 [P].

  Earlier assistant turns have the ids that `encode_demo` gives them.

  Args:
    messages: conversation that ends with a user turn.
    template: "" for the tokenizer's own chat template, or the path of a .jinja file. A tokenizer
      without one gets the plain form: BOS if the tokenizer adds one itself, turns joined by "\n",
      EOS after each assistant turn.
    source: where the messages came from, for error messages.

  Raises:
    UserError: no user turn at the end, a missing template file, or a template that refuses the
      messages or rewrites earlier turns.
  """
  if not messages or messages[-1]["role"] == "assistant":
    raise UserError(f"{source or 'prompt'}: a prompt must end with a user message")
  turns, tail = _encode_turns(messages, tokenizer, template, source)
  return np.asarray([t for p, r in turns for t in p + r] + tail, np.int32)


def encode_response(
  text: str,
  messages: Sequence[Message],
  tokenizer: "PreTrainedTokenizerFast",
  template: str = "",
  source: str = "",
  ended: bool = True,
) -> np.ndarray:
  """Ids of `text` as the answer to `messages`, EOS included; int32 [T].

  `render_prompt(messages)` followed by these ids is what `encode_demo` trains on. A template that
  trims its messages (Gemma, Llama 3) trims `text` as well.

  Args:
    ended: False if `text` was cut off (`Demo.ended`): no EOS then.
  """
  if not messages or messages[-1]["role"] == "assistant":
    raise UserError(f"{source or 'prompt'}: a prompt must end with a user message")
  answered = [*messages, {"role": "assistant", "content": text}]
  turns, _ = _encode_turns(answered, tokenizer, template, source, ended)
  return np.asarray(turns[-1][1], np.int32)


def encode_demo(
  demo: Demo,
  tokenizer: "PreTrainedTokenizerFast",
  train_on: str = "all",
  template: str = "",
) -> Example:
  """Tokenises a demonstration and marks what is trained.

  Trained are the tokens of assistant turns from the first response token to the EOS that ends the
  turn; a last turn that was cut off (`Demo.ended`) ends without one. Not trained: prompts,
  generation prompts, and what a template writes after an EOS; after the last EOS nothing is kept.

  Args:
    train_on: "all" assistant turns, or the "last" one only.
    template: as in `render_prompt`.

  Raises:
    UserError: as `render_prompt`, naming `demo.source`.
  """
  if train_on not in ("all", "last"):
    raise UserError(f"train_on={train_on!r} is unknown; known: all, last")
  if not demo.messages or demo.messages[-1]["role"] != "assistant":
    raise UserError(f"{demo.source or 'demo'}: a demonstration must end with an assistant message")
  turns, _ = _encode_turns(demo.messages, tokenizer, template, demo.source, demo.ended)
  tokens, mask = [], []
  for i, (prompt, response) in enumerate(turns):
    trained = float(train_on == "all" or i == len(turns) - 1)
    tokens += prompt + response
    mask += [0.0] * len(prompt) + [trained] * len(response)
  return Example(np.asarray(tokens, np.int32), np.asarray(mask, np.float32), demo.source)
