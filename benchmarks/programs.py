"""What the text of a compiled program tells of its logits."""

import math
import re

_SHAPE = re.compile(r"\b(f32|bf16|f16|f64)\[([\d,]+)\]")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}


def largest_logits(text: str, vocab_size: int, hidden_size: int) -> tuple[int, int]:
  """Elements of the floating-point array that has most with a dimension of the vocabulary, and
  the bytes of the one that takes most, which may be another; 0: none.

  The embedding table, the head, their gradients and moments, [V, D] in any order, are left
  out; everything else with that dimension is logits or made of them. Arrays inside of fusions
  count although they never reach memory, so this is an upper bound. No other size of the model
  may equal the vocabulary's.
  """
  table = sorted((vocab_size, hidden_size))
  elements = size = 0
  for kind, dims in set(_SHAPE.findall(text)):
    shape = [int(d) for d in dims.split(",")]
    if vocab_size in shape and sorted(d for d in shape if d > 1) != table:
      elements = max(elements, math.prod(shape))
      size = max(size, math.prod(shape) * _BYTES[kind])
  return elements, size
