"""Joining a multi-process run: the first thing an entry point does, before JAX sees a device.

One process needs nothing. A run of several processes is described by three
variables, which launch/local_multiprocess.sh sets and any other launcher can:

  DPR_COORDINATOR    host:port of process 0
  DPR_NUM_PROCESSES  how many there are
  DPR_PROCESS_ID     which one this is, from 0

On a cluster that JAX knows (Cloud TPU, GKE, SLURM) they are not needed: JAX
finds its peers itself. DPR_DISTRIBUTED=1 demands that where this module cannot
tell that there are several hosts, and DPR_DISTRIBUTED=0 forbids it.

DPR_PEER_SECONDS is the patience with a process that shows no sign of life (peers.py).
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from dpr_jax import peers, relay
from dpr_jax.errors import UserError

START_SECONDS = 290.0  # that processes wait for each other; JAX's own limit is 300.
_VARIABLES = ("DPR_COORDINATOR", "DPR_NUM_PROCESSES", "DPR_PROCESS_ID")
_LOOPBACK = ("127.0.0.1", "localhost")
# What a SLURM task has; an interactive allocation has only some of it, and is one process.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


def _integer(environ: Mapping[str, str], name: str, low: int) -> int:
  value = environ[name]
  if not value.isdecimal() or int(value) < low:
    raise UserError(f"{name}={value!r} must be a whole number of at least {low}")
  return int(value)


def _spelt_out(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize from the DPR_ variables; None if none is set."""
  missing = [name for name in _VARIABLES if not environ.get(name)]
  if len(missing) == len(_VARIABLES):
    return None
  if missing:
    raise UserError(f"{', '.join(missing)} not set; a run of several processes needs all of "
                    f"{', '.join(_VARIABLES)}")
  address = environ["DPR_COORDINATOR"]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(f"DPR_COORDINATOR={address!r} must be host:port, as in 10.0.0.1:8476")
  count = _integer(environ, "DPR_NUM_PROCESSES", 1)
  index = _integer(environ, "DPR_PROCESS_ID", 0)
  if index >= count:
    raise UserError(f"DPR_PROCESS_ID={index} must be below DPR_NUM_PROCESSES={count}")
  arguments = {"coordinator_address": address, "num_processes": count, "process_id": index,
               "cluster_detection_method": "deactivate"}
  if host in _LOOPBACK:  # Else the coordinator listens on every interface.
    arguments["coordinator_bind_address"] = address
  return arguments


def _on_a_cluster(environ: Mapping[str, str]) -> bool:
  """Whether the environment says that there are several processes which JAX can find itself."""
  wanted = environ.get("DPR_DISTRIBUTED", "")
  if wanted not in ("", "0", "1"):
    raise UserError(f"DPR_DISTRIBUTED={wanted!r} must be 1 (join the other hosts) or 0 (do not)")
  if wanted:
    return wanted == "1"
  hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip()]
  slices = environ.get("MEGASCALE_NUM_SLICES", "")
  if len(hosts) > 1 or (slices.isdecimal() and int(slices) > 1):
    return True
  tasks = environ.get("SLURM_NTASKS", "")
  return all(name in environ for name in _SLURM) and tasks.isdecimal() and int(tasks) > 1


def _found() -> dict[str, Any]:
  """Arguments of jax.distributed.initialize that JAX finds on a cluster; {} if it finds none."""
  names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
  given = os.environ.get("JAX_COORDINATOR_ADDRESS")
  try:
    from jax._src.clusters import ClusterEnv  # What `initialize` itself calls.

    found = dict(zip(names, ClusterEnv.auto_detect_unset_distributed_params(
        given, None, None, None, None, int(START_SECONDS))))
  except Exception:  # `initialize` meets it as well, and says what it is.
    return {}
  if any(found[name] is None for name in names[:3]):
    return {}
  if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    del found["local_device_ids"]
  return {**found, "cluster_detection_method": "deactivate"}


def _start_relay(address: str) -> tuple[Any, str]:
  """The relay to the coordinator, and its address, to which gRPC goes directly."""
  if any(name.lower() in ("grpc_proxy", "https_proxy", "http_proxy") for name in os.environ):
    direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, (direct, "127.0.0.1")))
  try:
    return relay.start(address)
  except OSError as e:
    raise UserError(f"the relay to the coordinator cannot be started: {e}") from None


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
  """A block in which the processes find each other; JAX would abort where one does not come."""

  def end() -> None:
    where = os.environ.get("DPR_COORDINATOR")
    print("error: the processes of this run have not all come together within "
          f"{START_SECONDS:g} s{f' at DPR_COORDINATOR={where}' if where else ''}; see what the "
          "others say", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(START_SECONDS, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def initialize() -> None:
  """Joins the other processes of the run, if the environment says that there are any.

  Call it before anything that touches a device. A second call does nothing.

  Raises:
    UserError: naming the variable that is missing or wrong, or DPR_DISTRIBUTED=1 where JAX finds
      no cluster.
  """
  arguments = _spelt_out(os.environ)
  if arguments is None and not _on_a_cluster(os.environ):
    return
  import jax

  if jax.distributed.is_initialized():
    return
  patience = peers.patience()
  # Signals are handled by signals.py and agreed on by peers.py, SIGINT like SIGTERM.
  jax.config.update("jax_enable_preemption_service", False)
  service = None
  with _meeting():
    given = dict(arguments or _found())
    if given.get("process_id"):
      service, given["coordinator_address"] = _start_relay(given["coordinator_address"])
    try:
      jax.distributed.initialize(**given)
    except ValueError as e:
      if arguments is not None:
        raise
      raise UserError(  # Nothing detected: "coordinator_address should be defined."
        f"several processes are asked for, but JAX finds no Cloud TPU, GKE or SLURM here ({e}); "
        f"set {', '.join(_VARIABLES)}, or DPR_DISTRIBUTED=0 to run alone"
      ) from None
  if service is not None:
    relay.joined(service)
  peers.start(patience, service)
