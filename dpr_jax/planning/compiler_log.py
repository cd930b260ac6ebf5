"""What a compiler writes to stderr: from C++, past `sys.stderr`, also where it compiles."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator

# What the partitioner logs where it finds no way from one layout of an array to another but to
# copy the whole of it to every device.
REMATERIALIZATION = "Involuntary full rematerialization"


@dataclasses.dataclass
class CompilerLog:
  """Filled when `captured` ends."""

  text: str = ""

  @property
  def rematerializations(self) -> int | None:
    """Arrays that the partitioner copies whole; None where the compiler logged nothing at all.

    At the level that `topologies.prepare_environment` sets, the TPU compiler always logs.
    Silence means that its log goes elsewhere, or that nothing was compiled (a cache).
    """
    return self.text.count(REMATERIALIZATION) if self.text.strip() else None


@contextlib.contextmanager
def captured() -> Iterator[CompilerLog]:
  """Sends file descriptor 2 into the log; nothing of it is shown."""
  log = CompilerLog()
  sys.stderr.flush()
  shown = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield log
    finally:
      sys.stderr.flush()
      os.dup2(shown, 2)
      os.close(shown)
      file.seek(0)
      log.text = file.read().decode(errors="replace")
