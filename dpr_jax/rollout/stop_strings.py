"""Stop strings: ends a response at the token that completes one of several strings.

A stop string is searched for in the text of a response, not among its token ids: it may begin
within one token and end within another, and a character may be split over several tokens. Decoding
that text at every step would take a host round trip per token. Instead, the bytes of all stop
strings are compiled into one deterministic automaton (Aho and Corasick, "Efficient string
matching", 1975), and the automaton is run over the bytes of every token of the vocabulary once, in
advance. What remains is a table next_state[state, token], so that a decoding step costs one gather
per slot.

The text of a response is `tokenizer.decode(tokens, skip_special_tokens=False)`, as
`evaluation.responses.response_text` returns it, so a response is ended exactly where that text
first contains a stop string. Three details of decoders follow from this:
  - A special token has its name as its text, so "<|im_end|>" can be a stop string.
  - Where the decoder strips the space that begins a text (SentencePiece), no stop string matches
    that space.
  - SentencePiece decodes a run of byte tokens (<0xE2> <0x82> <0xAC>) as a whole. If the run is not
    valid UTF-8, all of it becomes U+FFFD, and no stop string matches within it.

Dims: K slots, S states, V vocabulary, A automaton nodes, M vocabulary tokens that have text.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_symbols

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

START, MATCHED = 0, 1  # States: nothing decoded yet; a stop string is complete, for good.


@struct.dataclass
class StopStrings:
  """Compiled stop strings: a pytree of one array, so tables of one shape share a program."""

  next_state: jax.Array | np.ndarray  # int32 [S, V]

  def start(self, slots: int) -> jax.Array:
    """Returns the state of slots whose response is empty, int32 [K]."""
    return jnp.full((slots,), START, jnp.int32)

  def advance(self, state_K: jax.Array, token_K: jax.Array) -> jax.Array:
    """Returns the state of every slot after its next token, int32 [K]."""
    return jnp.asarray(self.next_state).at[state_K, token_K].get(mode="promise_in_bounds")


def check_stop_strings(strings: Sequence[str]) -> None:
  """Raises UserError, naming the string, if one of the stop strings can never be used.

  These are the empty string, which would end every response at once, and a string with U+FFFD or
  with a lone surrogate, which stand for bytes that are not text.
  """
  if isinstance(strings, str):
    raise TypeError(f"stop strings must be a sequence of strings, not the one string {strings!r}")
  for string in strings:
    if not string:
      raise UserError(f"stop string {string!r} is empty; it would end every response at once")
    if any(c == "\ufffd" or "\ud800" <= c <= "\udfff" for c in string):
      raise UserError(f"stop string {string!r} holds bytes that are not UTF-8 text")


def build_stop_strings(
    tokenizer: "PreTrainedTokenizerFast", vocab_size: int, strings: Sequence[str]
) -> StopStrings | None:
  """Compiles stop strings for a tokenizer; returns None if there are none.

  Args:
    tokenizer: byte-level BPE, or SentencePiece-like with or without byte fallback.
    vocab_size: rows of the model's embedding, V. Rows without a token have no text.
    strings: the stop strings.

  Returns:
    A host table whose number of states is a power of two, of at least 16: other stop strings of
    about the same length then run the same compiled program.

  Raises:
    UserError: an unusable stop string (see `check_stop_strings`), or a tokenizer whose decoder is
      not known here.
  """
  check_stop_strings(strings)
  if not strings:
    return None
  goto_Ax256 = _automaton([string.encode() for string in strings])
  text = _texts_of(tokenizer, len(tokenizer), vocab_size)
  # Breadth-first over the reachable states. The first two are START and MATCHED.
  start, matched = (text.strip, True, _WHOLE, 0), (0, False, _WHOLE, len(goto_Ax256) - 1)
  index, rows = {start: START, matched: MATCHED}, []
  states = [start, matched]
  for state in states:
    if state == matched:
      rows.append(np.full(vocab_size, MATCHED, np.int32))
      continue
    new_V, keys = text.advance(state, goto_Ax256)
    for key in keys:
      if key not in index:
        index[key] = len(states)
        states.append(key)
    rows.append(np.asarray([index[key] for key in keys], np.int32)[new_V])
  table_SxV = np.zeros((max(16, 1 << (len(rows) - 1).bit_length()), vocab_size), np.int32)
  table_SxV[: len(rows)] = rows
  return StopStrings(next_state=table_SxV)


# --- The automaton over bytes ---------------------------------------------------------------------


def _automaton(patterns: Sequence[bytes]) -> np.ndarray:
  """Returns goto[node, byte], int32 [A, 256]. Node 0 is the root; the last one is absorbing.

  The absorbing node is entered with the byte that completes a pattern.
  """
  children, ends = [{}], [False]
  for pattern in patterns:
    node = 0
    for byte in pattern:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
        ends.append(False)
      node = children[node][byte]
    ends[node] = True
  done = len(children)
  goto = np.zeros((done + 1, 256), np.int32)
  fail = [0] * done  # The node of the longest proper suffix that is a prefix of a pattern.
  order = [0]
  for node in order:
    if node:
      goto[node] = goto[fail[node]]
    for byte, child in children[node].items():
      fail[child] = int(goto[node, byte])  # Before it is overwritten: where the suffix goes.
      ends[child] |= ends[fail[child]]
      goto[node, byte] = child
      order.append(child)
  goto = np.where(np.asarray([*ends, True])[goto], done, goto)
  goto[done] = done
  return goto.astype(np.int32)


# States of the UTF-8 decoder within a run of byte tokens.
_WHOLE, _BROKEN = 0, 8  # Between characters, or outside of a run; the run is not valid UTF-8.


def _utf8() -> np.ndarray:
  """Returns next[state, byte] of a strict UTF-8 decoder, int8 [9, 256] (RFC 3629)."""
  out = np.full((9, 256), _BROKEN, np.int8)
  # (state, first byte, last byte, next state). State 1 expects the last byte of a character, 3 the
  # last but one, 6 the last but two; 2, 4, 5 and 7 exclude overlong forms, surrogates and the rest.
  for state, first, last, then in (
      (_WHOLE, 0x00, 0x7F, _WHOLE), (_WHOLE, 0xC2, 0xDF, 1), (_WHOLE, 0xE0, 0xE0, 2),
      (_WHOLE, 0xE1, 0xEF, 3), (_WHOLE, 0xED, 0xED, 4), (_WHOLE, 0xF0, 0xF0, 5),
      (_WHOLE, 0xF1, 0xF3, 6), (_WHOLE, 0xF4, 0xF4, 7),
      (1, 0x80, 0xBF, _WHOLE), (2, 0xA0, 0xBF, 1), (3, 0x80, 0xBF, 1), (4, 0x80, 0x9F, 1),
      (5, 0x90, 0xBF, 3), (6, 0x80, 0xBF, 3), (7, 0x80, 0x8F, 3),
  ):
    out[state, first : last + 1] = then
  return out


# --- The text of tokens ---------------------------------------------------------------------------

# (leading characters that may still be stripped, no token yet, UTF-8 state, automaton node).
_State = tuple[int, bool, int, int]


@dataclasses.dataclass(frozen=True)
class _Texts:
  """What a tokenizer's decoder makes of each token."""

  vocab_size: int
  ids_M: np.ndarray  # int64, the tokens that have text.
  later: "_Pieces"  # Their text in the middle of a response, in the order of `ids_M`.
  first: "_Pieces"  # Their text at its beginning.
  in_run_M: np.ndarray  # bool, byte tokens, which are decoded in runs.
  strip: int  # At most so many leading characters are stripped from a response.

  def advance(self, state: _State, goto_Ax256: np.ndarray) -> tuple[np.ndarray, list[_State]]:
    """Returns (index [V], states): states[index[v]] follows `state` when token v is decoded."""
    strip, is_first, run, node = state
    pieces = self.first if is_first else self.later
    stripped_M = np.minimum(pieces.leading_M, strip)
    node_M = pieces.walk(goto_Ax256, 0 if run == _BROKEN else node, stripped_M)
    # Only a piece that was stripped as a whole leaves anything to strip.
    strip_M = np.where(stripped_M == pieces.length_M, strip - stripped_M, 0)
    run_M = np.full(len(node_M), _WHOLE)
    at = self.in_run_M
    run_M[at] = _utf8()[run, pieces.first_byte_M[at]]
    done = len(goto_Ax256) - 1
    node_M = np.where(run_M == _BROKEN, 0, node_M)
    run_M = np.where(node_M == done, _WHOLE, run_M)
    strip_M = np.where(node_M == done, 0, strip_M)
    codes_M = (strip_M * 9 + run_M) * (done + 1) + node_M
    own = -1  # Ids without a token are left out of the text.
    codes_V = np.full(self.vocab_size, own, np.int64)
    codes_V[self.ids_M] = codes_M
    codes, index_V = np.unique(codes_V, return_inverse=True)
    keys = []
    for code in codes.tolist():
      rest, at_node = divmod(code, done + 1)
      keys.append(state if code == own else (rest // 9, False, rest % 9, at_node))
    return index_V, keys


@functools.lru_cache(maxsize=4)
def _texts_of(tokenizer: "PreTrainedTokenizerFast", size: int, vocab_size: int) -> _Texts:
  del size  # Part of the cache key: a token that is added later changes it.
  backend = tokenizer.backend_tokenizer
  decoder = _Decoder.of(json.loads(backend.to_str())["decoder"])
  names = [backend.id_to_token(i) for i in range(vocab_size)]
  ids = [i for i, name in enumerate(names) if name is not None]
  later, in_run = zip(*(decoder.text(names[i], False) for i in ids), strict=True)
  first = [decoder.text(names[i], True)[0] for i in ids]
  return _Texts(
      vocab_size=vocab_size, ids_M=np.asarray(ids),
      later=_Pieces.of(later, decoder.strip_character),
      first=_Pieces.of(first, decoder.strip_character), in_run_M=np.asarray(in_run),
      strip=decoder.strip,
  )


@dataclasses.dataclass(frozen=True)
class _Pieces:
  """The bytes of M tokens, end to end."""

  bytes_: np.ndarray  # uint8
  begin_M: np.ndarray
  length_M: np.ndarray
  leading_M: np.ndarray  # How many of the character that is stripped each one begins with.

  @classmethod
  def of(cls, pieces: Sequence[bytes], strip_character: str) -> "_Pieces":
    length_M = np.asarray([len(p) for p in pieces])
    strip = strip_character.encode()
    return cls(
        bytes_=np.frombuffer(b"".join(pieces) + b"\0", np.uint8),
        begin_M=np.cumsum(length_M) - length_M,
        length_M=length_M,
        leading_M=np.asarray([len(p) - len(p.lstrip(strip)) for p in pieces]),
    )

  @property
  def first_byte_M(self) -> np.ndarray:
    return self.bytes_[self.begin_M]

  def walk(self, goto_Ax256: np.ndarray, node: int, skip_M: np.ndarray) -> np.ndarray:
    """Returns the node after each piece but for its first `skip_M` bytes, int32 [M]."""
    node_M = np.full(len(self.length_M), node, np.int32)
    at_M, end_M = self.begin_M + skip_M, self.begin_M + self.length_M
    left = np.flatnonzero(at_M < end_M)
    while left.size:
      node_M[left] = goto_Ax256[node_M[left], self.bytes_[at_M[left]]]
      at_M[left] += 1
      left = left[at_M[left] < end_M[left]]
    return node_M


@dataclasses.dataclass(frozen=True)
class _Decoder:
  """The decoder of a tokenizer, token by token."""

  # Each makes text of a token's name: (name, whether it is the first token) -> text.
  steps: tuple[Callable[[str, bool], str], ...] = ()
  byte_level: bool = False
  byte_fallback: bool = False
  strip: int = 0
  strip_character: str = " "

  @classmethod
  def of(cls, spec: dict[str, Any] | None) -> "_Decoder":
    """Reads the `decoder` entry of a tokenizer.json.

    Raises:
      UserError: it does something other than the steps known here.
    """
    kind = (spec or {}).get("type")
    parts = spec["decoders"] if kind == "Sequence" else [spec or {}]
    fields: dict[str, Any] = {}
    steps, fused = [], False
    for part in parts:
      match part:
        case {"type": "ByteLevel"} if not fields:
          fields["byte_level"] = fused = True
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fields:
          steps.append(lambda name, first, old=old, new=new: name.replace(old, new))
        case {"type": "Metaspace", "replacement": space} if not fields:
          drops = part.get("prepend_scheme", "always") != "never"
          steps.append(
              lambda name, first, space=space, drops=drops: name.replace(
                  space, "" if first and drops else " "
              )
          )
        case {"type": "ByteFallback"} if not fields:
          fields["byte_fallback"] = True
        case {"type": "Fuse"}:
          fused = True
        case {"type": "Strip", "content": content, "start": n, "stop": 0} if (
            fused and content.isascii() and "strip" not in fields
        ):
          fields.update(strip=n, strip_character=content)
        case _:
          raise UserError(f"stop strings: the tokenizer's decoder {json.dumps(spec)} is not "
                          "supported; it must be byte-level or SentencePiece-like")
    return cls(steps=tuple(steps), **fields)

  def text(self, name: str, first: bool) -> tuple[bytes, bool]:
    """Returns (bytes of a token, whether they are decoded in a run with their neighbours)."""
    for step in self.steps:
      name = step(name, first)
    if self.byte_level:
      symbols = _bytes_of_symbols()  # A name with any other character, of an added token, is text.
      try:
        return bytes([symbols[c] for c in name]), False
      except KeyError:
        return name.encode(), False
    if self.byte_fallback and len(name) == 6 and name[:3] == "<0x" and name[5] == ">":
      try:
        return bytes([int(name[3:5], 16)]), True
      except ValueError:
        pass
    return name.encode(), False


@functools.cache
def _bytes_of_symbols() -> dict[str, int]:
  return {symbol: byte for byte, symbol in enumerate(byte_symbols())}
