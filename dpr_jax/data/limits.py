"""What a file may ask for: how deep its JSON nests, how long a prompt and a chat template are.

Files come from elsewhere. What no honest file holds is refused in one line, before it costs minutes
or memory, or ends in an error at the last line that is written.
"""

import contextlib
import functools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpr_jax.errors import UserError

MAX_DEPTH = 100  # of JSON.
MAX_TEMPLATE = 1_000_000  # characters of a chat template, and the largest number in it.
TEMPLATE_SECONDS = 10.0
TEMPLATE_BYTES = 1 << 30  # that a process may grow by while a template is rendered.
_TICK = 0.05  # seconds between two looks at both.
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"\d[\d_]*")


def check_unicode(text: str, what: str) -> None:
  """Raises UserError for half of a character, which JSON can escape and no tokenizer can encode."""
  if not text.isascii() and (half := _HALF.search(text)):
    raise UserError(f"{what} holds a lone surrogate (\\u{ord(half[0]):04x}), half of a character; "
                    "expected Unicode text")


def parse_json(text: str, where: str) -> Any:
  """`json.loads`, for values that can be written again.

  Raises:
    UserError: it nests too deep, has an integer of thousands of digits, or text with half of a
      character.
    json.JSONDecodeError: it is malformed.
  """
  try:
    value = json.loads(text)
  except json.JSONDecodeError:
    raise
  except RecursionError:
    raise UserError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels") from None
  except ValueError:
    raise UserError(f"{where}: an integer of thousands of digits") from None
  if text.count("[") + text.count("{") > MAX_DEPTH or _ESCAPED_HALF.search(text):
    if isinstance(value, list):  # Of records.
      for i, record in enumerate(value):
        _check_json(record, f"{where}[{i}]")
    else:
      _check_json(value, where)
  return value


def _check_json(value: Any, where: str) -> None:
  """Raises UserError for what `parse_json` refuses in a value that was read."""
  left = [(value, 0, "", where, "")]  # With the field it is in, where that is, and its own path.
  while left:
    item, depth, field, at, path = left.pop()
    if depth > MAX_DEPTH:
      raise UserError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
    if isinstance(item, str):
      check_unicode(item, f"{at}: field {field!r}")
    if isinstance(item, dict):
      inside = f"{where}: {path}" if path else where
      for key, x in item.items():
        below = f"{path}.{key}" if path else key
        left += [(key, depth, key, inside, ""), (x, depth + 1, key, inside, below)]
    elif isinstance(item, list):
      left += [(x, depth + 1, field, at, f"{path}[{i}]") for i, x in enumerate(item)]


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: Any, size: int) -> int:
  del size  # Part of the cache key: a token added later changes it.
  return max(map(len, tokenizer.get_vocab()), default=1)


def check_length(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, limit: int, where: str
) -> None:
  """Refuses, before it is tokenised, a text that `limit` tokens cannot hold.

  Raises:
    UserError: even in the longest tokens of the vocabulary it is longer.
  """
  length = sum(len(m["content"]) for m in messages if isinstance(m["content"], str))
  if length > max(limit, 1) * _longest_token(tokenizer, len(tokenizer)):
    raise UserError(f"{where}: {length} characters are more than the {limit} tokens there is room "
                    "for can hold")


@functools.lru_cache(maxsize=8)
def check_template(template: str) -> None:
  """Raises UserError for a chat template that is huge, or has a number that could make it so."""
  if len(template) > MAX_TEMPLATE:
    raise UserError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are "
                    "read")
  for number in _NUMBER.findall(template):
    if len(number) > 7 or int(number) > MAX_TEMPLATE:
      raise UserError(f"the chat template has the number {number[:20]}; {MAX_TEMPLATE} is the "
                      "largest that is allowed in one")
  if "**" in template and re.search(r"{[{%][^}]*\*\*", template):
    raise UserError("the chat template raises a number to a power, which is not allowed in one")


def _memory() -> tuple[int, int] | None:
  """(address space, resident memory) of this process in bytes; None where nothing says it."""
  try:
    with open("/proc/self/statm", encoding="ascii") as file:
      pages = file.read().split()
    return tuple(int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[:2])
  except OSError:
    return None


@contextlib.contextmanager
def bounded(seconds: float, size: int, what: str) -> Iterator[None]:
  """Ends Python code that takes longer, or more memory, in the main thread; elsewhere nothing does.

  The memory is looked at while the code runs, and, where the system can, a single piece of it is
  refused when it is asked for.

  Raises:
    UserError: "`what` took longer than ... s", or "... more memory than ...".
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or not hasattr(signal, "setitimer"):
    yield
    return
  import resource

  started, memory = time.monotonic(), _memory()
  space = resource.getrlimit(resource.RLIMIT_AS)
  too_much = UserError(f"{what} took more memory than {size >> 20} MiB")

  def look(signum, frame):
    now = _memory()
    late = time.monotonic() - started > seconds
    if late or (now and memory and now[1] - memory[1] > size):
      signal.setitimer(signal.ITIMER_REAL, 0)
      raise UserError(f"{what} took longer than {seconds:g} s") if late else too_much

  before = signal.signal(signal.SIGALRM, look)
  outer = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
  if memory and space[0] == resource.RLIM_INFINITY:
    # More than `size`: what other threads ask for in the meantime is not refused.
    resource.setrlimit(resource.RLIMIT_AS, (memory[0] + 4 * size, space[1]))
  try:
    yield
  except MemoryError:
    raise too_much from None
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, space)
    if outer[0]:  # A timer that ran before goes on.
      left = max(outer[0] - (time.monotonic() - started), 0.01)
      signal.setitimer(signal.ITIMER_REAL, left, outer[1])
