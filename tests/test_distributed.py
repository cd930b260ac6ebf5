"""What the environment must say for a process to join others."""

import os
import socket
import subprocess
import sys

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
    {"coordinator_address": "10.0.0.1:8476", **both},
    # A run on one machine is not to be reached from others.
    {"coordinator_address": "127.0.0.1:99", "coordinator_bind_address": "127.0.0.1:99", **both},
  ]


@pytest.mark.parametrize("environ", [
  {"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}, SLURM, {"DPR_DISTRIBUTED": "1"},
])
def test_on_a_cluster(calls, monkeypatch, environ):
  watched = []
  monkeypatch.setattr(distributed.peers, "start", watched.append)
  call(monkeypatch, {**environ, "DPR_PEER_SECONDS": "7"})
  assert calls == [{}] and watched == [7.0]


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
