"""What a plan reports of programs that the compiler refuses, and of what it logs."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dpr_jax import plan
from dpr_jax.errors import UserError
from dpr_jax.methods.programs import Program, RolloutWork, TrainWork
from dpr_jax.planning import report
from dpr_jax.planning import topologies as topologies_lib
from dpr_jax.planning.compiler_log import REMATERIALIZATION, captured
from dpr_jax.planning.programs import planned_model

V5E = topologies_lib.parse_topology("v5e:4x4")
ROLLOUTS, UPDATE = RolloutWork(64, 1024, 512, 2), TrainWork(64, 2048, 2047)


class _Fails:
  """A lowered program whose compilation ends with an error."""

  def __init__(self, message: str):
    self.message = message

  def compile(self):
    os.write(2, f"W0000 spmd] {REMATERIALIZATION} of a\nI0000 done\n".encode())
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_out_of_memory_has_all_keys():
  lower = lambda: _Fails("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.50G of 15.75G hbm.")
  entry = report.compile_program(Program("a/b", lower, UPDATE, 5.0), V5E)
  assert tuple(entry) == report.KEYS
  assert entry["fits"] is False and entry["exhausted_bytes"] == int(17.5 * 2**30)
  assert entry["resident_bytes"] == 5 and entry["involuntary_rematerializations"] == 1
  assert entry["peak_bytes"] is entry["bound_seconds"] is entry["collective_bytes"] is None
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    report.compile_program(Program("a/b", lambda: _Fails("INTERNAL: broken"), ROLLOUTS), V5E)


def test_a_mesh_that_ends_early_names_all_programs(monkeypatch):
  lower = lambda: _Fails("RESOURCE_EXHAUSTED: that is all")
  programs = [Program("sft/train_step", lower, UPDATE, tokens=64 * 2048),
              Program("mine/rollout_step", lower, ROLLOUTS),
              Program("mine/train_step", lower, UPDATE, tokens=64 * 512)]
  monkeypatch.setattr(report, "make_programs", lambda *args: programs)
  config, _ = plan.parse(["--config=configs/llama31_8b.py", "--topology=v5e:4x4"])
  planned = report.plan_mesh(config, planned_model(config), V5E, jax.devices()[:1], (1, 1, 1))
  assert list(planned["programs"]) == [p.name for p in programs] and not planned["fits"]
  assert [p["fits"] for p in planned["programs"].values()] == [False, None, None]
  assert all(tuple(p) == report.KEYS for p in planned["programs"].values())
  assert planned["tokens_per_second_bound"] == {"sft": None, "mine": None}
  # Compiled, but with what else is alive too large.
  entries = planned["programs"]
  entries["sft/train_step"] |= {"bound_seconds": {"compute": 1.0}, "peak_bytes": 1}
  assert report.speeds(programs, entries) == {"sft": None, "mine": None}
  entries["sft/train_step"]["fits"] = True
  assert report.speeds(programs, entries) == {"sft": 64 * 2048, "mine": None}
  for name in ("mine/rollout_step", "mine/train_step"):  # A step of a stage runs all its programs.
    entries[name] |= {"bound_seconds": {"compute": 1.0, "hbm": 2.0}, "fits": True}
  assert report.speeds(programs, entries) == {"sft": 64 * 2048, "mine": 64 * 512 / 4}


def test_the_log_of_a_compiler_is_read_below_python(capfd):
  os.write(2, b"before\n")
  with captured() as log:
    os.write(2, f"W1 a] {REMATERIALIZATION}. x\nW1 a] {REMATERIALIZATION}. y\n".encode())
  os.write(2, b"after\n")
  assert log.rematerializations == 2
  with captured() as quiet:
    os.write(2, b"I0000 nothing of note\n")
  assert quiet.rematerializations == 0
  with captured() as silent:
    pass
  assert silent.rematerializations is None  # Not 0: nobody knows.
  with pytest.raises(KeyError), captured() as log:
    raise KeyError
  os.write(2, b"at last\n")
  assert capfd.readouterr().err == "before\nafter\nat last\n"


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("\n"), ValueError("first\nsecond")])
def test_a_compiler_that_refuses_is_one_line(error, monkeypatch):
  from jax.experimental import topologies

  def refuse(*args, **kwargs):
    raise error

  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  with pytest.raises(UserError) as refused:
    topologies_lib.describe(topologies_lib.parse_topology("h100:8"))
  text = str(refused.value)
  assert "\n" not in text and ("first" if str(error).strip() else "RuntimeError") in text


# A table split over vocabulary and fsdp, looked up with rows that data and fsdp split: the
# partitioner finds no way from the one layout to the other. Beside it, a table that is not split.
_CONTROL = """
import json
from dpr_jax.planning.topologies import describe, parse_topology, prepare_environment

prepare_environment()
import jax
import jax.numpy as jnp
from dpr_jax import sharding
from dpr_jax.methods.programs import Program, TrainWork
from dpr_jax.planning.report import compile_program

topology = parse_topology("v5e:4x4")
mesh = sharding.make_mesh(2, 4, 2, devices=describe(topology))

ROWS = ("data", "fsdp")

def program(*spec):
  placed = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
      shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
  arguments = (placed((512, 256), jnp.bfloat16, *spec), placed((16, 64), jnp.int32, ROWS))

  @jax.jit
  def look_up(table, tokens):
    return jax.lax.with_sharding_constraint(table[tokens], jax.P(ROWS, None, None))

  return Program("a/look_up", lambda: look_up.lower(*arguments), TrainWork(16, 64, 0))

with jax.set_mesh(mesh):
  found = [compile_program(program(*spec), topology)["involuntary_rematerializations"]
           for spec in (("tensor", "fsdp"), (None, None))]
print("RESULT " + json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_program_that_copies_whole_arrays_is_found_out():
  """The control of every 0 in a plan: this one is not."""
  root = pathlib.Path(plan.__file__).parents[1]
  done = subprocess.run([sys.executable, "-c", _CONTROL], cwd=root, text=True, timeout=600,
                        capture_output=True, env={**os.environ, "PYTHONPATH": str(root)})
  assert done.returncode == 0, done.stderr
  copied, plain = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
  assert copied >= 1 and plain == 0
  assert REMATERIALIZATION not in done.stderr
