"""A trace covers the steps that were asked for, and ends with the stage."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dpr_jax import main as entry_point
from dpr_jax.errors import UserError
from dpr_jax.config.sections import parse_steps
from dpr_jax.training.profiling import trace_steps


@pytest.mark.parametrize("text, steps", [("", None), ("3:5", (3, 5)), ("7:7", (7, 7))])
def test_steps_are_parsed(text, steps):
  assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["3", "a:b", "5:3", "0:2", "-1:2", "1:2:3", " 1:2", "1:", "1.5:2"])
def test_bad_steps_are_refused(text):
  with pytest.raises(ValueError, match="FIRST") as e:
    parse_steps(text)
  assert "\n" not in str(e.value) and text in str(e.value)


def test_the_flag_of_the_entry_point():
  argv = ["--config=configs/smoke.py:debug", "--workdir=unused"]
  config, *_ = entry_point.parse([*argv, "--profile_steps=2:4"])
  plain, *_ = entry_point.parse(argv)
  assert config.log.profile_steps == "2:4" and plain.log.profile_steps == ""
  assert dataclasses.replace(config, log=plain.log) == plain
  with pytest.raises(UserError, match="--profile_steps: '4:2'"):
    entry_point.parse([*argv, "--profile_steps=4:2"])
  with pytest.raises(UserError, match="config.log: 'x'"):
    entry_point.parse([*argv, "--config.log.profile_steps=x"])


def test_traces_these_steps_alone(tmp_path):
  double = jax.jit(lambda x: 2 * x)
  active, x = [], jnp.ones(3)
  with trace_steps((2, 3), tmp_path / "profile") as trace:
    for step in range(1, 6):
      with trace.step(step) as results:
        x = double(x)
        active.append(trace.active)
        results.append(x)
  assert active == [False, True, True, False, False]
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_resumed_or_failed_stage_ends_its_trace(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with trace_steps((2, 9), tmp_path / "profile") as trace:
      with trace.step(5) as results:  # Resumed after step 4: the rest of the range.
        results.append(jnp.ones(2) + 1)
      assert trace.active
      raise ZeroDivisionError
  assert not trace.active and list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_nothing_is_traced_by_default(tmp_path):
  with trace_steps(None, None) as trace:
    with trace.step(1):
      assert not trace.active
  assert not list(tmp_path.iterdir())
