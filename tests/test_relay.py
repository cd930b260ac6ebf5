"""What passes through the relay arrives as it is; a service that ends is told, and held back."""

import secrets
import signal
import socket
import threading
import time

import pytest

from dpr_jax import relay


@pytest.fixture
def service():
  """A listening socket, and its address."""
  with socket.create_server(("127.0.0.1", 0)) as listening:
    listening.settimeout(20)
    yield listening, f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def start():
  begun = []

  def begin(address):
    process, own = relay.start(address)
    process.address = own
    begun.append(process)
    return process, socket.create_connection(client_address(process), timeout=20)

  yield begin
  for process in begun:
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


def client_address(process):
  host, _, port = process.address.rpartition(":")
  return host, int(port)


def receive(connection, count):
  data = b""
  while len(data) < count and (more := connection.recv(1 << 16)):
    data += more
  return data


def test_bytes_pass_both_ways(service, start):
  listening, address = service
  process, client = start(address)
  server, _ = listening.accept()
  there, back = secrets.token_bytes(3_000_001), secrets.token_bytes(2_000_003)
  with client, server:
    for sender, reader, data in ((client, server, there), (server, client, back)):
      sending = threading.Thread(target=sender.sendall, args=(data,))
      sending.start()
      assert receive(reader, len(data)) == data
      sending.join()


def test_a_client_that_leaves_is_no_loss(service, start):
  listening, address = service
  process, client = start(address)
  server, _ = listening.accept()
  client.close()
  with server:
    assert server.recv(1) == b""  # The service sees that it has left.
  process.stdin.close()
  assert process.stdout.read() == ""


def pass_one_byte(server, client):
  server.sendall(b"!")
  assert receive(client, 1) == b"!"


@pytest.mark.parametrize("reset, signum", [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_a_service_that_ends_is_told_and_the_client_keeps_its_connection(
    service, start, reset, signum
):
  listening, address = service
  process, client = start(address)
  server, _ = listening.accept()
  pass_one_byte(server, client)
  relay.joined(process)
  time.sleep(0.5)
  process.send_signal(signum)
  if reset:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
  server.close()
  assert process.stdout.readline() == f"{relay.GONE}\n"
  client.settimeout(0.5)
  with client, pytest.raises(TimeoutError):
    client.recv(1)


def test_a_service_that_ends_before_the_client_has_joined_may_come_again(service, start):
  listening, address = service
  process, client = start(address)
  server, _ = listening.accept()
  pass_one_byte(server, client)
  server.close()
  with client:
    assert client.recv(1) == b""  # It is told as without a relay, and tries again.
  with socket.create_connection(client_address(process), timeout=20) as client:
    server, _ = listening.accept()
    with server:
      pass_one_byte(server, client)
  process.stdin.close()
  assert process.stdout.read() == ""


def test_the_service_may_begin_later(start):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  _, client = start(f"127.0.0.1:{port}")
  client.sendall(b"early")
  with socket.create_server(("127.0.0.1", port)) as listening:
    listening.settimeout(20)
    server, _ = listening.accept()
    with client, server:
      assert receive(server, 5) == b"early"
