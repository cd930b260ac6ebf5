"""A relay to the coordination service: a program of its own, which tells when the service is gone.

JAX's client of the service aborts its process, with a dozen lines of C++, as soon as the connection
breaks. Through a relay it does not see that: the relay keeps its side open, and its parent reads
`GONE` and ends in one line (peers.py). It is not a thread, since JAX may wait for the service while
it holds the interpreter. Run as

  python relay.py HOST:PORT

it prints the port it listens on, on loopback. Until its parent writes `JOINED` to it, connections
end as those of the service do, so that the client tries again. It ends with its standard input.
"""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys

GONE, JOINED = "gone", "joined"
_RETRY_SECONDS = 0.2  # The service may not have begun yet.


def start(address: str) -> tuple[subprocess.Popen, str]:
  """(the relay, the address that stands for `address` in this process).

  Raises:
    OSError: the relay cannot be started.
  """
  command = [sys.executable, "-P", "-s", "-S", str(pathlib.Path(__file__).resolve()), address]
  relay = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
      start_new_session=True)
  port = relay.stdout.readline().strip()
  if not port:
    raise OSError(f"the relay to {address} has not started")
  return relay, f"127.0.0.1:{port}"


def joined(relay: subprocess.Popen) -> None:
  """Tells the relay that the client has joined: from now on it hides the end of the service."""
  relay.stdin.write(f"{JOINED}\n")
  relay.stdin.flush()


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
    except (OSError, UnicodeError):  # A name that is no name never resolves.
      await asyncio.sleep(_RETRY_SECONDS)


async def _run(address: str) -> None:
  host, _, port = address.rpartition(":")
  has_joined = asyncio.Event()
  kept = []  # A writer that nothing holds closes its connection.

  async def relay(reader, writer) -> None:
    kept.append(writer)
    from_service, to_service = await _connect(host.strip("[]"), port)
    answers = asyncio.create_task(_copy(from_service, writer))
    requests = asyncio.create_task(_copy(reader, to_service))
    await asyncio.wait({answers, requests}, return_when=asyncio.FIRST_COMPLETED)
    gone = (answers.done() and answers.result()) or (requests.done() and not requests.result())
    if gone and has_joined.is_set():
      print(GONE, flush=True)
      return
    for one in (to_service, writer):
      one.close()

  server = await asyncio.start_server(relay, "127.0.0.1", 0)
  print(server.sockets[0].getsockname()[1], flush=True)
  read = lambda: asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
  while line := await read():
    if line.strip() == JOINED:
      has_joined.set()
  os._exit(0)  # What is under way has nobody to tell.


if __name__ == "__main__":
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)  # For the parent, even where every process gets it.
  asyncio.run(_run(sys.argv[1]))
