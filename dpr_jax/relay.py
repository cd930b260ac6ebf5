"""A relay to the coordination service: a program of its own, which tells when the service is gone.

JAX's client of the service aborts its process, with a dozen lines of C++, as soon as the connection
breaks. Through a relay it does not see that: the relay keeps its side open, and its parent reads
`GONE` and ends in one line (peers.py). It is not a thread, since JAX may wait for the service while
it holds the interpreter. Run as

  python relay.py HOST:PORT

it prints the port it listens on, on loopback, and ends with its standard input.
"""

import asyncio
import os
import pathlib
import subprocess
import sys

GONE = "gone"
_RETRY_SECONDS = 0.2  # The service may not have begun yet.


def start(address: str) -> tuple[subprocess.Popen, str]:
  """(the relay, the address that stands for `address` in this process).

  Raises:
    OSError: the relay cannot be started.
  """
  command = [sys.executable, "-I", "-S", str(pathlib.Path(__file__).resolve()), address]
  relay = subprocess.Popen(  # A session of its own: a Ctrl-C is for the parent.
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
  port = relay.stdout.readline().strip()
  if not port:
    raise OSError(f"the relay to {address} has not started")
  return relay, f"127.0.0.1:{port}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
  """Copies until one side ends; returns whether it was the side that is read."""
  while True:
    try:
      data = await reader.read(1 << 16)
    except OSError:
      data = b""
    if not data:
      return True
    try:
      writer.write(data)
      await writer.drain()
    except OSError:
      return False


async def _connect(host: str, port: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
  while True:
    try:
      return await asyncio.open_connection(host, port)
    except OSError:
      await asyncio.sleep(_RETRY_SECONDS)


async def _run(address: str) -> None:
  host, _, port = address.rpartition(":")

  kept = []  # A writer that nothing holds closes its connection.

  async def relay(reader, writer) -> None:
    kept.append(writer)
    from_service, to_service = await _connect(host.strip("[]"), port)
    answers = asyncio.create_task(_copy(from_service, writer))
    requests = asyncio.create_task(_copy(reader, to_service))
    await asyncio.wait({answers, requests}, return_when=asyncio.FIRST_COMPLETED)
    if (answers.done() and answers.result()) or (requests.done() and not requests.result()):
      print(GONE, flush=True)
      return
    for one in (to_service, writer):
      one.close()

  server = await asyncio.start_server(relay, "127.0.0.1", 0)
  print(server.sockets[0].getsockname()[1], flush=True)
  await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
  os._exit(0)  # What is under way has nobody to tell.


if __name__ == "__main__":
  asyncio.run(_run(sys.argv[1]))
