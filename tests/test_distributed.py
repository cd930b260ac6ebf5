"""What the environment must say for a process to join others."""

import os
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

from dpr_jax import distributed
from dpr_jax.errors import UserError

SPELT_OUT = {"DPR_COORDINATOR": "10.0.0.1:8476", "DPR_NUM_PROCESSES": "4", "DPR_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}


@pytest.fixture
def calls(monkeypatch):
  """Keyword arguments of every call of jax.distributed.initialize; the environment is bare."""
  for name in list(os.environ):
    if name.startswith(("DPR_", "SLURM_", "TPU_WORKER", "MEGASCALE")):
      monkeypatch.delenv(name)
  made = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: made.append(kwargs))
  monkeypatch.setattr(distributed.relay, "start", lambda address: (None, f"relay to {address}"))
  return made


def call(monkeypatch, environ):
  with monkeypatch.context() as m:
    for name, value in environ.items():
      m.setenv(name, value)
    distributed.initialize()


def test_alone(calls, monkeypatch):
  for environ in (
    {}, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"TPU_WORKER_HOSTNAMES": "a,"},
    {"MEGASCALE_NUM_SLICES": "1"}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    {**SLURM, "SLURM_NTASKS": "1"}, {"DPR_DISTRIBUTED": "0", **SLURM}, {"DPR_COORDINATOR": ""},
  ):
    call(monkeypatch, environ)
  assert calls == []


def test_spelt_out(calls, monkeypatch):
  call(monkeypatch, SPELT_OUT)
  call(monkeypatch, {**SPELT_OUT, "DPR_COORDINATOR": "127.0.0.1:99", **SLURM})
  both = {"num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate"}
  assert calls == [
    {"coordinator_address": "relay to 10.0.0.1:8476", **both},
    # A run on one machine is not to be reached from others.
    {"coordinator_address": "relay to 127.0.0.1:99", "coordinator_bind_address": "127.0.0.1:99",
     **both},
  ]


def test_the_coordinator_needs_no_relay(calls, monkeypatch):
  call(monkeypatch, {**SPELT_OUT, "DPR_PROCESS_ID": "0"})
  assert calls[0]["coordinator_address"] == "10.0.0.1:8476" and calls[0]["process_id"] == 0


@pytest.mark.parametrize("environ", [
  {"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}, {"DPR_DISTRIBUTED": "1"},
])
def test_several_hosts_where_jax_finds_no_cluster(calls, monkeypatch, environ):
  watched = []
  monkeypatch.setattr(distributed.peers, "start", lambda *args: watched.append(args))
  call(monkeypatch, {**environ, "DPR_PEER_SECONDS": "7"})
  assert calls == [{}] and watched == [(7.0, None)]


@pytest.mark.parametrize("more, ids", [({}, {"local_device_ids": [0]}),
                                       ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, {})])
def test_on_a_cluster(calls, monkeypatch, more, ids):
  for process, address in enumerate(("node1:65535", "relay to node1:65535")):
    call(monkeypatch, {**SLURM, "SLURM_JOB_ID": "65535", "SLURM_PROCID": str(process), **more})
    assert calls[-1] == {"coordinator_address": address, "num_processes": 2, "process_id": process,
                         "cluster_detection_method": "deactivate", **ids}


@pytest.mark.parametrize("change, pattern", [
  ({"DPR_PROCESS_ID": ""}, "^DPR_PROCESS_ID not set; a run of several processes needs all of"),
  ({"DPR_PROCESS_ID": "", "DPR_COORDINATOR": ""}, "^DPR_COORDINATOR, DPR_PROCESS_ID not set"),
  ({"DPR_NUM_PROCESSES": "two"}, "DPR_NUM_PROCESSES='two' must be a whole number of at least 1"),
  ({"DPR_NUM_PROCESSES": "0"}, "DPR_NUM_PROCESSES='0'"),
  ({"DPR_PROCESS_ID": "-1"}, "DPR_PROCESS_ID='-1' must be a whole number of at least 0"),
  ({"DPR_PROCESS_ID": "4"}, "DPR_PROCESS_ID=4 must be below DPR_NUM_PROCESSES=4"),
  ({"DPR_COORDINATOR": "10.0.0.1"}, "DPR_COORDINATOR='10.0.0.1' must be host:port"),
  ({"DPR_COORDINATOR": ":80"}, "DPR_COORDINATOR=':80'"),
  ({"DPR_PEER_SECONDS": "0"}, "DPR_PEER_SECONDS='0' must be a number of seconds of at least 5"),
  ({"DPR_COORDINATOR": "a:99999"}, "DPR_COORDINATOR='a:99999'"),
])
def test_wrong_variables_are_named(calls, monkeypatch, change, pattern):
  with pytest.raises(UserError, match=pattern):
    call(monkeypatch, {**SPELT_OUT, **change})
  assert calls == []


def test_wrong_switch(calls, monkeypatch):
  with pytest.raises(UserError, match="DPR_DISTRIBUTED='yes' must be 1"):
    call(monkeypatch, {"DPR_DISTRIBUTED": "yes"})


def test_no_cluster_where_one_is_demanded(calls, monkeypatch):
  def initialize():
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(UserError, match="JAX finds no Cloud TPU, GKE or SLURM.*DPR_DISTRIBUTED=0"):
    call(monkeypatch, {"DPR_DISTRIBUTED": "1"})


def test_a_second_call_does_nothing(calls, monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  call(monkeypatch, SPELT_OUT)
  call(monkeypatch, {"DPR_DISTRIBUTED": "1"})
  assert calls == []


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_does_not_come_ends_the_others_in_one_line(process):
  program = ("from dpr_jax import distributed; distributed.START_SECONDS = 2.0; "
             "distributed.initialize()")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environ = {**os.environ, "JAX_PLATFORMS": "cpu", "DPR_COORDINATOR": address,
             "DPR_NUM_PROCESSES": "2", "DPR_PROCESS_ID": str(process)}
  done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True,
                        text=True, timeout=120)
  assert done.returncode == 1
  assert done.stderr == ("error: the processes of this run have not all come together within 2 s "
                         f"at DPR_COORDINATOR={address}; see what the others say\n")


@pytest.fixture
def start_three():
  """start_three(programs) -> processes that have joined one run, each with its program."""
  started = []

  def start(programs, **more):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"localhost:{free.getsockname()[1]}"
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "DPR_COORDINATOR": address,
               "DPR_NUM_PROCESSES": str(len(programs)), **more}
    for index, program in enumerate(programs):
      whole = ("import time; from dpr_jax import distributed, peers; peers._GONE_SECONDS = 4.0; "
               "distributed.initialize(); "
               f"print('up', flush=True); {program}")
      started.append(subprocess.Popen(
        [sys.executable, "-c", whole], env={**environ, "DPR_PROCESS_ID": str(index)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for one in started:
      assert one.stdout.readline() == "up\n"
    time.sleep(1.5)  # They have read each other's names.
    return started

  yield start
  for one in started:
    one.kill()
    one.communicate()


def test_a_coordinator_that_is_killed_ends_the_others_in_one_line(start_three):
  """Behind a proxy, too; also the one that has ended its work and waits for the others."""
  proxies = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost"}
  lead, *others = start_three(["time.sleep(100)", "time.sleep(100)", "pass"], **proxies)
  lead.kill()
  for index, one in enumerate(others, 1):
    _, said = one.communicate(timeout=60)
    name = re.escape(f"{socket.gethostname()}:{lead.pid}")
    assert one.returncode == 1 and re.fullmatch(
      rf"(.*proxy.*\n)*error: process (0( \({name}\))?, the coordinator, is gone: its connection "
      rf"has broken|{3 - index} .*); process {index} ends\n", said), said


def test_a_relay_that_cannot_start_is_one_line(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/nowhere/python")
  with pytest.raises(UserError, match="the relay to the coordinator cannot be started: .*nowhere"):
    distributed._start_relay("127.0.0.1:1")
