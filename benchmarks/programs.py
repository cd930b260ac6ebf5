"""What the text of a compiled program tells: the largest logits, and its collectives."""

import math
import re

_SHAPE = re.compile(r"\b(f32|bf16|f16|f64)\[([\d,]+)\]")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def largest_logits_bytes(text: str, vocab_size: int, hidden_size: int) -> int:
  """Bytes of the largest floating-point array with a dimension of the vocabulary; 0: none.

  The embedding table, the head, their gradients and moments, [V, D] in any order, are left
  out; everything else with that dimension is logits or made of them. Arrays inside of fusions
  count although they never reach memory, so this is an upper bound. No other size of the model
  may equal the vocabulary's.
  """
  table = sorted((vocab_size, hidden_size))
  largest = 0
  for kind, dims in set(_SHAPE.findall(text)):
    shape = [int(d) for d in dims.split(",")]
    if vocab_size in shape and sorted(d for d in shape if d > 1) != table:
      largest = max(largest, math.prod(shape) * _BYTES[kind])
  return largest


def collectives(text: str) -> dict[str, int]:
  """How often each collective stands in the program; in a loop's body it counts once."""
  count = lambda name: len(re.findall(rf"= \S.*? {name}(?:-start)?\(", text))
  return {name: n for name in _COLLECTIVES if (n := count(name))}
