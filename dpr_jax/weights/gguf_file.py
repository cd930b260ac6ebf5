"""The GGUF file format: metadata, tensor table, and dequantisation of rows to float32.

The header is parsed here because the reader of the `gguf` package creates a Python object for
each array element: 19 s and 0.7 GB for a vocabulary of 262,144. That package decodes the blocks.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dpr_jax.errors import UserError

PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
# struct codes of the metadata value types; 8 is a string, 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class _Entry:
  kind: str  # name of the ggml type.
  shape: tuple[int, ...]  # row-major, so the last dim is contiguous.
  begin: int  # byte offset in the file.
  row_bytes: int


class _Stream:
  """Sequential reads that raise UserError at the end of the file."""

  def __init__(self, path: pathlib.Path, f: BinaryIO, size: int):
    self.path, self.f, self.size = path, f, size

  def take(self, n: int) -> bytes:
    # A damaged length must not allocate that many bytes.
    data = self.f.read(n) if n <= self.size else b""
    if len(data) != n:
      raise UserError(f"{self.path}: damaged GGUF file, or cut short ({self.size} bytes)")
    return data

  def scalar(self, code: str) -> Any:
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def string(self) -> str:
    try:
      return self.take(self.scalar("Q")).decode("utf-8")
    except UnicodeDecodeError:
      raise UserError(f"{self.path}: damaged GGUF file: text that is not UTF-8") from None

  def value(self, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY and depth < 4:
      inner, count = self.scalar("I"), self.scalar("Q")
      if inner in _SCALARS:
        data = self.take(count * struct.calcsize("<" + _SCALARS[inner]))
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", data))
      return [self.value(inner, depth + 1) for _ in range(count)]
    if kind not in _SCALARS:
      raise UserError(f"{self.path}: damaged GGUF file: unknown metadata type {kind}")
    return self.scalar(_SCALARS[kind])


class GGUFFile:
  """A .gguf file: its `metadata`, and its tensors under their ggml names."""

  def __init__(self, path: pathlib.Path):
    """Parses everything but the tensor data.

    Raises:
      UserError: the `gguf` package is missing; the file is damaged, cut short, or of a
        version or tensor type that is not implemented.
    """
    self.path, self.where = path, str(path)
    self._ggml = _package()
    try:
      size = path.stat().st_size
      with path.open("rb") as f:
        self._parse(_Stream(path, f, size))
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    self.shapes = {name: entry.shape for name, entry in self._entries.items()}
    self.quantised = any(entry.kind not in PLAIN for entry in self._entries.values())

  def _parse(self, stream: _Stream) -> None:
    path, ggml = self.path, self._ggml
    if stream.take(4) != b"GGUF":
      raise UserError(f"{path}: not a GGUF file")
    version = stream.scalar("I")
    if version not in (2, 3):
      raise UserError(f"{path}: GGUF version {version} is not implemented; known: 2 and 3, "
                      "little-endian")
    tensors, pairs = stream.scalar("Q"), stream.scalar("Q")
    self.metadata: dict[str, Any] = {}
    for _ in range(pairs):
      key = stream.string()
      self.metadata[key] = stream.value(stream.scalar("I"))
    if self.metadata.get("split.count", 1) not in (0, 1):
      raise UserError(f"{path}: is one part of a split GGUF; merge the parts into one file")
    table = []
    for _ in range(tensors):
      name, dims = stream.string(), stream.scalar("I")
      if dims > 4:
        raise UserError(f"{path}: damaged GGUF file: tensor {name!r} has {dims} dims")
      shape = tuple(stream.scalar("Q") for _ in range(dims))[::-1]
      table.append((name, shape, stream.scalar("I"), stream.scalar("Q")))
    alignment = self.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
      raise UserError(f"{path}: damaged GGUF file: general.alignment={alignment!r}")
    data = -(-stream.f.tell() // alignment) * alignment
    self._entries: dict[str, _Entry] = {}
    for name, shape, kind_id, offset in table:
      try:
        kind = ggml.GGMLQuantizationType(kind_id)
      except ValueError:
        raise UserError(f"{path}: tensor {name!r} has the unknown type {kind_id}") from None
      if kind.name not in PLAIN and kind.name not in QUANTISED:
        raise UserError(f"{path}: tensor {name!r} has type {kind.name}, which is not implemented; "
                        f"known: {', '.join((*PLAIN, *QUANTISED))}")
      block, block_bytes = ggml.GGML_QUANT_SIZES[kind]
      if not shape or shape[-1] % block:
        raise UserError(f"{path}: damaged GGUF file: tensor {name!r} of {kind.name} has shape "
                        f"{list(shape)}")
      row_bytes = shape[-1] // block * block_bytes
      end = data + offset + math.prod(shape[:-1]) * row_bytes
      if end > stream.size:
        raise UserError(f"{path}: cut short: tensor {name!r} ends at byte {end} of {stream.size}")
      self._entries[name] = _Entry(kind.name, shape, data + offset, row_bytes)

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype of `read`: float32 for a quantised file, else the stored dtype."""
    return np.dtype(np.float32) if self.quantised else PLAIN[self._entries[name].kind]

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Reads and decodes rows [start, stop) of a tensor, or elements of a vector."""
    entry = self._entries[name]
    if entry.kind in PLAIN:
      dtype = PLAIN[entry.kind]
      row = math.prod(entry.shape[1:])
      begin = entry.begin + start * row * dtype.itemsize
      out = self._bytes(name, dtype, begin, (stop - start) * row)
      return out.reshape(stop - start, *entry.shape[1:]).astype(self.dtype(name), copy=False)
    vector = len(entry.shape) == 1
    first, last = (0, 1) if vector else (start, stop)
    begin, count = entry.begin + first * entry.row_bytes, (last - first) * entry.row_bytes
    rows = self._bytes(name, np.dtype(np.uint8), begin, count).reshape(last - first, -1)
    out = self._ggml.quants.dequantize(rows, self._ggml.GGMLQuantizationType[entry.kind])
    return out[0, start:stop] if vector else out

  def _bytes(self, name: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    out = np.fromfile(self.path, dtype, count, offset=offset)
    if out.size != count:
      raise UserError(f"{self.path}: cut short while tensor {name!r} was read")
    return out


def _package() -> Any:
  try:
    import gguf
    import gguf.quants
  except ImportError:
    raise UserError("reading .gguf files needs the gguf package: pip install -e "
                    "'.[gguf]'") from None
  return gguf
