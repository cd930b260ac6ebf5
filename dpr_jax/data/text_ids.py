"""Text -> ids, where text may spell tokens that it must not become; and ids -> text.

A message that spells a token of the chat template ("<|im_end|>") gets the ids of that text and not
the token, so that no user can close a turn or open one. `protect` marks such text before it is
rendered, and `encode` resolves the marks.
"""

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

from dpr_jax.errors import UserError

# Brackets around the number of a token spelled in a message. They are noncharacters, which no text
# may hold; one that does is numbered as well.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@functools.lru_cache(maxsize=8)
def _added(tokenizer, size: int) -> tuple[tuple[str, ...], frozenset[str], frozenset[int]]:
  """Strings to number; those of special tokens and brackets; ids of all added tokens."""
  del size  # Part of the cache key: a token added later changes it.
  ids = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
  special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
  special |= set(tokenizer.all_special_ids)
  text = tokenizer.convert_ids_to_tokens
  always = frozenset({text(i) for i in special} | {_OPEN, _CLOSE})
  return tuple(sorted({text(i) for i in ids} | always)), always, frozenset(ids)


def added_tokens(text: str, tokenizer) -> list[int]:
  """Ids of the added tokens, special or not, that a rendered text holds."""
  added = _added(tokenizer, len(tokenizer))[2]
  return [i for i in encode(text, tokenizer) if i in added]


@functools.lru_cache(maxsize=16)
def _pattern(tokenizer, size: int, written: frozenset[str]) -> re.Pattern:
  # Longest first, so that a token which begins another does not win.
  strings = sorted(_added(tokenizer, size)[1] | written, key=lambda s: (-len(s), s))
  return re.compile("|".join(map(re.escape, strings)))


def protect(value: Any, tokenizer, written: Collection[str] = ()) -> Any:
  """Marks the token strings in a text, or in all texts of a JSON value; see `encode`.

  Args:
    written: strings of ordinary added tokens to mark, besides the special ones.
  """
  if isinstance(value, str):
    strings = _added(tokenizer, len(tokenizer))[0]
    pattern = _pattern(tokenizer, len(tokenizer), frozenset(written))
    return pattern.sub(lambda m: f"{_OPEN}{strings.index(m[0])}{_CLOSE}", value)
  if isinstance(value, dict):
    return {protect(k, tokenizer, written): protect(v, tokenizer, written)
            for k, v in value.items()}
  if isinstance(value, list):
    return [protect(v, tokenizer, written) for v in value]
  return value


def _encode_inside(text: str, tokenizer, split_special_tokens: bool) -> list[int]:
  """Ids of text that does not begin a text, so that SentencePiece puts no space before it."""
  encode = functools.partial(
    tokenizer.encode, add_special_tokens=False, split_special_tokens=split_special_tokens)
  head, both = encode(_OPEN), encode(_OPEN + text)  # A noncharacter: no token joins it.
  return both[len(head) :] if both[: len(head)] == head else encode(text)


def _spelled(literal: str, tokenizer, added: frozenset[int]) -> list[int]:
  """Ids of the characters of a token, without the token."""
  ids = _encode_inside(literal, tokenizer, split_special_tokens=True)
  if added.intersection(ids):  # Ordinary added tokens are found in any text that holds them whole.
    ids = [i for part in (literal[:1], literal[1:])
           for i in _encode_inside(part, tokenizer, split_special_tokens=True)]
  if added.intersection(ids):
    raise UserError(f"a message contains {literal!r}, which this tokenizer cannot write as "
                    "text; take it out of the message")
  return ids


def encode(text: str, tokenizer) -> list[int]:
  """Ids of rendered text: its special tokens parsed, marked strings as the text they are."""
  if _OPEN not in text:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
  strings, _, added = _added(tokenizer, len(tokenizer))
  ids = []
  for i, piece in enumerate(_MARK.split(text)):
    if i % 2:
      ids += _spelled(strings[int(piece)], tokenizer, added)
    elif i and piece:
      ids += _encode_inside(piece, tokenizer, split_special_tokens=False)
    elif piece:
      ids += tokenizer.encode(piece, add_special_tokens=False)
  return ids


def encode_after(prefix: str, text: str, tokenizer) -> list[int]:
  """Ids of `text` where it continues `prefix`, whose own ids stay as they are.

  SentencePiece-like tokenizers put a space before whatever they take for the beginning of a text.
  So `text` is tokenised behind its prefix and the prefix's ids are cut off, unless a merge across
  the border changed them; then `text` is tokenised alone.
  """
  if not text:
    return []
  if prefix:
    head, both = encode(prefix, tokenizer), encode(prefix + text, tokenizer)
    if both[: len(head)] == head:
      return both[len(head) :]
  return encode(text, tokenizer)


def text_of_ids(ids: Sequence[int], tokenizer) -> str:
  """What ids spell; special tokens keep their names."""
  return tokenizer.decode(
    [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(ids: Sequence[int], tokenizer) -> list[str]:
  """How each token reads behind those before it; the texts join to `text_of_ids(ids)`.

  A character that is split over tokens stands with the last of them; the others have no text.
  """
  texts: list[str] = []
  start, read = 0, ""  # Decoded from the last whole piece on, so that words keep their space.
  held = 0  # Tokens since then, none of which completed a character.
  for end in range(1, len(ids) + 1):
    text = text_of_ids(ids[start:end], tokenizer)
    if text.endswith("\ufffd") and end < len(ids):
      texts.append("")
      held += 1
      continue
    if not text.startswith(read):  # Bytes that are no character spoil those before them.
      start, read = end - held - 1, ""
      text = text_of_ids(ids[start:end], tokenizer)
    new = text[len(read) :]
    if held:  # What did not become a character is not this token's.
      whole = new.lstrip("\ufffd")
      texts[-1], new = new[: len(new) - len(whole)], whole
    texts.append(new)
    start, held = end - held - 1, 0
    read = text_of_ids(ids[start:end], tokenizer)
  return texts
