"""The lock of lock.py in a bucket: an object that is written on the condition that it is still what
was seen (its generation), so that of many only one takes it, refreshes it or removes it.
"""

import json
from collections.abc import Callable
from typing import Any


class BucketLock:
  """The lock at a path gs://BUCKET/..., for one run, whose record is `own`.

  Its methods raise OSError where the bucket is not there, or refuses.
  """

  def __init__(self, path: Any, own: dict[str, Any]):
    self._bucket, _, self._key = str(path).removeprefix("gs://").partition("/")
    self._content = json.dumps(own).encode() + b"\n"

  def _seen(self) -> tuple[bytes | None, bytes]:
    """(content, generation) of the object; without one the content is None."""
    found = self._ask("read")
    return found.value if found.state == "value" else None, found.stamp.generation

  def _write(self, content: bytes | None, generation: bytes) -> bool:
    """Writes or deletes the object; whether it was still of that generation, else it stays."""
    return bool(self._ask("write", content, if_equal=generation).generation)

  def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
    import tensorstore

    try:
      store = tensorstore.KvStore.open({"driver": "gcs", "bucket": self._bucket}).result()
      return getattr(store, method)(self._key, *args, **kwargs).result()
    except Exception as e:  # TensorStore has no error of its own.
      raise (FileNotFoundError if "NOT_FOUND" in str(e) else OSError)(str(e)) from None

  def take(self, check: Callable[[bytes], None]) -> None:
    """Raises what `check` raises, which is called with the content of a lock that is there."""
    while True:
      content, generation = self._seen()
      if content == self._content:  # It was written, though the answer was lost.
        return
      if content is not None:
        check(content)
      if self._write(self._content, generation):
        return

  def refresh(self) -> bool:
    """Whether no other run has it."""
    content, generation = self._seen()
    if content == self._content:
      self._write(content, generation)
    return content in (None, self._content)

  def release(self) -> None:
    content, generation = self._seen()
    if content == self._content:
      self._write(None, generation)
