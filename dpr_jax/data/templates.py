"""Conversation -> token ids and loss mask.

The chat template alone decides what surrounds the text, special tokens
included; nothing is added to what it renders except an EOS where it writes
none. Prompt and response are tokenised apart, exactly where generation starts,
so that training sees the ids that sampling will see. Masks follow from this
split, and from the template's own {% generation %} marks where it has them, but
never from ids: the pad token of many models is their EOS.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpr_jax.data.chat_template import ChatTemplate
from dpr_jax.data.demos import Demo, Message
from dpr_jax.data.text_ids import encode, encode_after
from dpr_jax.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Example:
  """One tokenised conversation of T tokens."""

  tokens: np.ndarray  # int32 [T]
  loss_mask: np.ndarray  # float32 [T], 1 where the token is trained (response tokens and EOS).
  source: str = ""  # where it came from, for messages.


@dataclasses.dataclass(frozen=True)
class _Turn:
  """An assistant turn of a conversation."""

  index: int  # of its message.
  prompt: list[int]  # what lies between the turn before and this response.
  response: list[int]  # ends in a stop id unless it was cut off.
  trained: list[bool]  # of the response; all, unless the template marks a part of it.


def stop_ids(
  tokenizer: "PreTrainedTokenizerFast", generation_config: Any = None, template: str = ""
) -> tuple[int, ...]:
  """Ids that end a response, the tokenizer's EOS first.

  These are `tokenizer.eos_token_id`, the token that the chat template writes at the end of an
  assistant turn (<|im_end|>, <end_of_turn>, <|eot_id|>), and `eos_token_id` (an int or a list)
  of `generation_config`, an object or a dict.

  Raises:
    UserError: there is none; generation would never stop.
  """
  ids = list(ChatTemplate.of(tokenizer, template).ends)
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
                    "a token; set eos_token in tokenizer_config.json")
  return tuple(dict.fromkeys(ids))


def _without_closing(response: str, before: Sequence[Message], chat: ChatTemplate) -> str:
  """What a template rendered of an answer to `before`, less what it writes after the content."""
  probe = "PROBE-REPLY"
  closed = chat.render([*before, {"role": "assistant", "content": probe}])
  return response.removesuffix(closed.rpartition(probe)[2])


class _Splitter:
  """Splits a conversation where generation would start and stop."""

  def __init__(self, messages: Sequence[Message], tokenizer, template: str, where: str):
    self.chat = ChatTemplate.of(tokenizer, template)
    self.tokenizer, self.where = tokenizer, where or "conversation"
    self.ends = stop_ids(tokenizer, template=template)
    self.messages = self.chat.protected(messages)
    self.chat.check_written(self.messages, where)
    self.turns: list[_Turn] = []
    self.lost: list[int] = []  # answers that the template writes otherwise in later prompts.
    self._done = self._context = ""  # Rendered so far; the last piece of it, to tokenise behind.
    self._rest: tuple[str, list[int]] = "", []  # What follows the last EOS: text or ids.

  def split(self, ended: bool = True) -> list[int]:
    """Fills `turns` and `lost`; `ended`: whether the last message, the assistant's, was cut off.

    Returns:
      The ids that follow the turns: the open prompt if the last message is not the assistant's.
    """
    starts = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
    if not starts or starts[-1] != len(self.messages) - 1:
      starts.append(len(self.messages))
    prompts = [self.chat.prompt(self.messages[:i], self.where) for i in starts]
    for k, (i, prompt) in enumerate(zip(starts, prompts)):
      prompt_ids, piece = self._prompt(prompt)
      if i == len(self.messages):
        return prompt_ids
      cut_off = not ended and i == len(self.messages) - 1
      following = prompts[k + 1] if k + 1 < len(prompts) else None
      self._answer(i, prompt, prompt_ids, piece, following, cut_off)
    return []

  def _prompt(self, prompt: str) -> tuple[list[int], str]:
    """Ids of what lies between the last response and the next one, and its text."""
    rest_text, rest_ids = self._rest
    if prompt.startswith(self._done):
      piece = rest_text + prompt[len(self._done) :]
      return rest_ids + encode_after(self._context, piece, self.tokenizer), piece
    self.lost += [turn.index for turn in self.turns]
    self.turns.clear()
    return encode(prompt, self.tokenizer), prompt

  def _answer(self, i, prompt, prompt_ids, piece, following, cut_off) -> None:
    done = self.chat.render(self.messages[: i + 1], False, self.where)
    if not done.startswith(prompt):
      raise UserError(
        f"{self.where}: the chat template's generation prompt is no prefix of the "
        f"answered turn (message {i + 1}); pass a template whose assistant turn begins with it"
      )
    response = done[len(prompt) :]
    self._rest = "", []
    if cut_off:
      # Without anything that the template writes to close the turn.
      response = _without_closing(response, self.messages[:i], self.chat)
      ids = encode_after(piece, response, self.tokenizer)
      if any(token in self.ends for token in ids):
        raise UserError(f"{self.where}: the text of a response that was cut off "
                        "(hit_eos is false) holds a token that ends a response")
      if not ids:
        raise UserError(f"{self.where}: a response that was cut off (hit_eos is "
                        "false) must have a token; leave it out")
    else:
      ids = encode_after(piece, response, self.tokenizer)
      end = next((j for j, token in enumerate(ids) if token in self.ends), None)
      if end is None:
        response, ids = self._closed(i, response, piece)
      elif following is None or following.startswith(done):
        ids, self._rest = ids[: end + 1], ("", ids[end + 1 :])
      else:
        # A template may write once, after the last turn, what no earlier turn has (Phi-3: an EOS),
        # or end the last turn otherwise (gpt-oss). The text before it must still be the same.
        token = self.tokenizer.convert_ids_to_tokens(ids[end])
        text, _, _ = response.partition(token)
        ended = following.startswith(prompt + text + token)
        response, ids = (text + token, ids[: end + 1]) if ended else (text, ids[:end])
        done = prompt + response
    self.turns.append(_Turn(i, prompt_ids, ids, self._marked(i, prompt, piece, len(ids))))
    self._done, self._context = done, response

  def _closed(self, i: int, response: str, piece: str) -> tuple[str, list[int]]:
    """A turn that the template closes with plain text: the EOS goes where the content ends."""
    if self.tokenizer.eos_token_id is None:
      raise UserError(f"{self.where}: the tokenizer defines no eos_token to end the "
                      "response; set it in tokenizer_config.json")
    content = self.messages[i]["content"]
    content = content if content in response else content.strip()
    cut = response.rfind(content) + len(content) if content in response else len(response)
    self._rest = response[cut:], []
    response = response[:cut]
    return response, encode_after(piece, response, self.tokenizer) + [self.tokenizer.eos_token_id]

  def _marked(self, i: int, prompt: str, piece: str, count: int) -> list[bool]:
    """Which of the first `count` ids of the response the template marks as generated."""
    if not self.chat.marks:
      return [True] * count
    done = self.messages[: i + 1]
    text, marked = self.chat.render(done), [False] * count
    place = lambda at: len(encode_after(piece, text[len(prompt) : at], self.tokenizer))
    for start, stop in self.chat.generation_spans(done, self.where):
      if stop > len(prompt):
        a, b = place(max(start, len(prompt))), place(stop)
        marked[a:b] = [True] * len(marked[a:b])
    return marked


def _check_asks(messages: Sequence[Message], source: str) -> None:
  if not messages or messages[-1]["role"] not in ("user", "tool"):
    raise UserError(f"{source or 'prompt'}: a prompt must end with a user message")


def render_prompt(
  messages: Sequence[Message],
  tokenizer: "PreTrainedTokenizerFast",
  template: str = "",
  source: str = "",
) -> np.ndarray:
  """Ids of a prompt with its generation prompt, ready to be continued; int32 [P].

  Earlier assistant turns have the ids that `encode_demo` gives them.

  Args:
    messages: conversation that ends with a user turn, or with the answer of a tool.
    template: "" for the tokenizer's own chat template, or the path of a .jinja file. A tokenizer
      without one gets the plain form: BOS if the tokenizer adds one itself, turns joined by "\n",
      EOS after each assistant turn.
    source: where the messages came from, for error messages.

  Raises:
    UserError: no user turn at the end, a missing template file, or a template that refuses the
      messages or passes over a part of them.
  """
  _check_asks(messages, source)
  splitter = _Splitter(messages, tokenizer, template, source)
  tail = splitter.split()
  return np.asarray([t for x in splitter.turns for t in x.prompt + x.response] + tail, np.int32)


def encode_response(
  response: str | Message,
  messages: Sequence[Message],
  tokenizer: "PreTrainedTokenizerFast",
  template: str = "",
  source: str = "",
  ended: bool = True,
) -> np.ndarray:
  """Ids of `response` as the answer to `messages`, EOS included; int32 [T].

  `render_prompt(messages)` followed by these ids is what `encode_demo` trains on. A template that
  trims its messages (Gemma, Llama 3) trims the response as well.

  Args:
    response: its text, or the whole message where it has more (calls of tools, a reasoning).
    ended: False if it was cut off (`Demo.ended`): no EOS then.
  """
  _check_asks(messages, source)
  if isinstance(response, str):
    response = {"role": "assistant", "content": response}
  splitter = _Splitter([*messages, response], tokenizer, template, source)
  splitter.split(ended)
  return np.asarray(splitter.turns[-1].response, np.int32)


def encode_demo(
  demo: Demo,
  tokenizer: "PreTrainedTokenizerFast",
  train_on: str = "all",
  template: str = "",
) -> Example:
  """Tokenises a demonstration and marks what is trained.

  Trained are the tokens of assistant turns (but `demo.untrained`) from the first response token to
  the EOS that ends the turn; a last turn that was cut off (`Demo.ended`) ends without one. Not
  trained: prompts, generation prompts, and what a template writes after an EOS; after the last EOS
  nothing is kept. Of a template with {% generation %}, only what it marks is trained.

  Args:
    train_on: "all" assistant turns, or the "last" one only.
    template: as in `render_prompt`.

  Raises:
    UserError: as `render_prompt`, naming `demo.source`; or a turn to train is written otherwise
      once it is not the last, so that one sequence cannot hold what sampling would see.
  """
  if train_on not in ("all", "last"):
    raise UserError(f"train_on={train_on!r} is unknown; known: all, last")
  if not demo.messages or demo.messages[-1]["role"] != "assistant":
    raise UserError(f"{demo.source or 'demo'}: a demonstration must end with an assistant message")
  splitter = _Splitter(demo.messages, tokenizer, template, demo.source)
  splitter.split(demo.ended)
  last = len(demo.messages) - 1
  trains = lambda i: i not in demo.untrained and (train_on == "all" or i == last)
  if lost := [i for i in splitter.lost if trains(i)]:
    raise UserError(
      f"{splitter.where}: the chat template rewrites earlier turns (message {lost[0] + 1}), so "
      "several turns cannot be trained as one sequence; train on the last turn only, or pass a "
      "template that only appends"
    )
  tokens, mask = [], []
  for turn in splitter.turns:
    tokens += turn.prompt + turn.response
    mask += [False] * len(turn.prompt) + [t and trains(turn.index) for t in turn.trained]
  return Example(np.asarray(tokens, np.int32), np.asarray(mask, np.float32), demo.source)
