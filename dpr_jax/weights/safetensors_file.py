"""The safetensors file format: 8 bytes of header length, a JSON header, the tensors.

Files are read and written with plain file operations instead of a memory map, so that a process
holds only the rows it is working on, and a damaged file gives a readable error.
Source of the format: https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from dpr_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation.


class SafetensorsFile:
  """The tensors of one safetensors file, by name."""

  def __init__(self, path: pathlib.Path):
    """Reads and checks the header.

    Raises:
      UserError: the file is not a safetensors file, is damaged or is cut short.
    """
    self.path = path
    try:
      size = path.stat().st_size
      with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
          raise UserError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        header = json.loads(f.read(length).decode("utf-8"))
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError:
      raise
    except (ValueError, RecursionError):  # An integer of thousands of digits is a ValueError.
      raise UserError(f"{path}: damaged safetensors header") from None
    if not isinstance(header, dict):
      raise UserError(f"{path}: damaged safetensors header")
    header.pop("__metadata__", None)
    self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    data, spans = 8 + length, []
    for name, entry in header.items():
      try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(n) is int for n in (*shape, begin, end)) and isinstance(kind, str)
        if not whole or not 0 <= begin <= end or min(shape, default=0) < 0:
          raise ValueError
      except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged safetensors header at tensor {name!r}") from None
      if data + end > size:
        raise UserError(f"{path}: cut short: tensor {name!r} ends at byte {data + end} of {size}")
      if kind in DTYPES and end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise UserError(f"{path}: tensor {name!r}: its bytes do not match its shape {list(shape)}")
      self._entries[name] = (kind, shape, data + begin)
      spans.append((begin, end, name))
    for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(spans)):
      if begin < end:
        raise UserError(f"{path}: damaged safetensors header: {one!r} and {other!r} overlap")
    self.shapes = {name: shape for name, (_, shape, _) in self._entries.items()}

  def dtype(self, name: str) -> np.dtype:
    kind = self._entries[name][0]
    if kind not in DTYPES:
      raise UserError(f"{self.path}: tensor {name!r} has dtype {kind}, which is not implemented; "
                      f"known: {', '.join(DTYPES)}")
    return DTYPES[kind]

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop) of a tensor into a new array."""
    _, shape, begin = self._entries[name]
    dtype, row = self.dtype(name), math.prod(shape[1:])
    count = (stop - start) * row
    offset = begin + start * row * dtype.itemsize
    out = np.fromfile(self.path, dtype, count, offset=offset)
    if out.size != count:
      raise UserError(f"{self.path}: cut short while tensor {name!r} was read")
    return out.reshape(stop - start, *shape[1:])


def write_safetensors(
    path: pathlib.Path, entries: Mapping[str, tuple[np.dtype, Sequence[int]]],
    fetch: Callable[[str], np.ndarray], write: bool = True,
) -> None:
  """Writes tensors one at a time; the file has a temporary name until it is complete.

  Args:
    entries: name -> (dtype, shape), in the order of storage.
    fetch: name -> tensor; called once per name.
    write: False only fetches, for processes that take part in collectives but do not write.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it.
  offset = 0
  for name, (dtype, shape) in entries.items():
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  if not write:
    for name in entries:
      fetch(name)
    return
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  part = path.with_name(path.name + ".part")
  with part.open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape) in entries.items():
      x = fetch(name)
      if x.dtype != dtype or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got {x.dtype}{x.shape}, declared {dtype}{tuple(shape)}")
      # numpy's tofile does not support the extension dtypes.
      f.write(np.ascontiguousarray(x).view(np.uint8).data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)
