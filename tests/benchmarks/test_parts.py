"""Counts, program texts and the protocol, each against a plain reference."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import ModelConfig


def test_counts_of_operations(rng):
  from benchmarks import counts
  from dpr_jax.planning.flops import layer_params

  window, length, first = int(rng.integers(2, 5)), int(rng.integers(5, 9)), int(rng.integers(0, 4))
  cfg = ModelConfig(
      vocab_size=29, hidden_size=12, mlp_size=20, num_layers=5, num_heads=4, num_kv_heads=2,
      head_dim=6, layer_pattern=("local", "local", "global"), window=window,
  )
  # Every weight that is not a norm's takes part in one matrix product; the tied head's in one.
  norms = 5 * 2 * 12 + 12
  assert layer_params(cfg) + counts.head_weights(cfg) == cfg.num_params - norms
  keys = 0
  for layer in range(5):
    for query in range(first, first + length):
      for key in range(query + 1):
        keys += layer % 3 == 2 or query - key < window
  assert counts.seen(cfg, first, first + length) == keys
  rows, scored = 3, 2
  products = rows * (
      length * layer_params(cfg) + scored * counts.head_weights(cfg) + 2 * keys * 4 * 6
  )
  assert counts.forward_flops(cfg, rows, length, scored, first) == 2 * products
  assert counts.train_flops(cfg, rows, length, scored) == 3 * counts.forward_flops(
      cfg, rows, length, scored
  )
  cache = 0.0
  for query in range(first, first + length):
    for layer in range(5):
      cache += 2 * 2 * 6 * (query + 1 if layer % 3 == 2 else min(query + 1, window))
  weights = layer_params(cfg) + counts.head_weights(cfg)
  expected = 4 * (weights + rows * cache / length)
  np.testing.assert_allclose(counts.decode_bytes(cfg, rows, first, length, 4), expected)


def test_largest_logits_of_a_program():
  from benchmarks.programs import largest_logits

  def program(chunks):
    def run(hidden, table):
      body = lambda h: jax.nn.logsumexp(h @ table.T, axis=-1)
      return jax.lax.map(body, hidden.reshape(chunks, -1, 8))

    shapes = jnp.zeros((12, 8)), jnp.zeros((37, 8))
    return jax.jit(run).lower(*shapes).compile().as_text()

  assert largest_logits(program(1), 37, 8) == (12 * 37, 4 * 12 * 37)
  assert largest_logits(program(4), 37, 8) == (3 * 37, 4 * 3 * 37)
  assert largest_logits("x = f32[37,8]{1,0} y = f32[8,37] z = s32[12,37]", 37, 8) == (0, 0)
  text = "a = bf16[5,37] b = f32[2,37]"
  assert largest_logits(text, 37, 8) == (5 * 37, 2 * 5 * 37)
  assert largest_logits(text + " c = f32[3,37]", 37, 8) == (5 * 37, 4 * 3 * 37)


def test_plain_steps_against_a_loop(rng):
  from benchmarks.rollout import plain_steps, skewed_stops

  lengths, slots = rng.integers(1, 20, 12).tolist(), 4
  steps = 0
  for i in range(0, 12, slots):
    alive = [n - 1 for n in lengths[i:i + slots]]
    while any(n > 0 for n in alive):
      alive, steps = [n - 1 for n in alive], steps + 1
  assert plain_steps(lengths, slots) == steps
  stops = skewed_stops(100, 4, 0)
  assert len(set(stops)) == 25 and set(stops) <= set(range(100))


PROGRAM = """
import sys
from benchmarks import protocol

class Workload:
  def setup(self):
    print("noise on stdout")
    if "absent" in sys.argv:
      import no_such_package_anywhere
    return {"calls": 0}
  def round(self):
    print("more noise")
    if "fail" in sys.argv:
      raise ValueError("went wrong here")
    return {"main": 0.5}
  def finish(self):
    return {"peak_bytes": protocol.peak_host_bytes()}

protocol.serve(Workload)
"""


def test_protocol_of_processes():
  from benchmarks.protocol import Failed, Process, Unavailable

  start = lambda *words: Process([sys.executable, "-c", PROGRAM, *words])
  side = start()
  assert side.setup() == {"calls": 0}
  assert [side.round(), side.round()] == [{"main": 0.5}] * 2
  # Its own peak, not that of this process with jax in it.
  assert 2**20 < side.finish()["peak_bytes"] < 2**27
  side.close()
  side = start("absent")
  with pytest.raises(Unavailable, match="no_such_package_anywhere"):
    side.setup()
  side.close()
  side = start("fail")
  side.setup()
  with pytest.raises(Failed, match="went wrong here"):
    side.round()
  side.close()


def test_a_trainer_is_stepped():
  from benchmarks.protocol import Stepped

  seen = []

  def train(stepped):
    for i in range(3):
      stepped.begin()
      seen.append(i)
      stepped.end()

  stepped = Stepped(train)
  assert seen == []  # Nothing before it is told to.
  assert stepped.round() >= 0 and seen == [0]
  stepped.round()
  stepped.round()
  assert seen == [0, 1, 2]
  with pytest.raises(RuntimeError, match="ended before"):
    stepped.round()


def test_compilation_is_what_the_first_calls_took_longer():
  from benchmarks.protocol import warm_up

  times = iter([5.0, 3.0, 1.0])
  assert warm_up(lambda: next(times)) == 6.0


def test_sides_alternate_or_follow_each_other():
  from benchmarks import protocol, rounds

  log = []

  class Fake:
    def __init__(self, name):
      self.name = name

    def setup(self):
      log.append(f"open {self.name}")
      if self.name == "absent":
        raise protocol.Unavailable("no such package")
      return {"versions": {}}

    def round(self):
      log.append(self.name)
      return {"main": 2.0 if self.name == "peer" else 0.5}

    def finish(self):
      return {"peak_bytes": 30 if self.name == "peer" else 10}

    def close(self):
      log.append(f"close {self.name}")

  openers = {name: lambda name=name: Fake(name) for name in ("ours", "absent", "peer")}
  sides = rounds.alternate(openers, 2, sequential=False)
  assert log == ["open ours", "open absent", "open peer", "ours", "peer", "ours", "peer",
                 "close ours", "close absent", "close peer"]
  peer = rounds.compare(sides["peer"], sides["ours"], tokens=6)
  assert (peer["ratio"], peer["memory_ratio"], peer["tokens_per_s"]) == (4.0, 3.0, 3.0)
  absent = rounds.compare(sides["absent"], sides["ours"], tokens=6)
  assert absent == {"unavailable": "no such package"}
  log.clear()
  rounds.alternate(openers, 2, sequential=True)
  assert log == ["open ours", "ours", "ours", "close ours", "open absent", "close absent",
                 "open peer", "peer", "peer", "close peer"]


def test_peers_take_llama_shapes_only():
  import dataclasses

  from benchmarks import common, rounds
  from dpr_jax.errors import UserError

  cfg = ModelConfig(vocab_size=29, tied_head=True)
  shape = rounds.llama_shape(cfg)
  assert shape["vocab_size"] == 29 and shape["intermediate_size"] == cfg.mlp_size
  assert shape["rope_parameters"] == {"rope_type": "default", "rope_theta": cfg.rope.theta}
  scaled = common.config_shape("configs/llama32_1b.py", 0)
  assert rounds.llama_shape(scaled)["rope_parameters"]["rope_type"] == "llama3"
  for change in ({"qk_norm": True}, {"embed_scale": 2.0}, {"activation": "gelu_tanh"},
                 {"layer_pattern": ("local",), "window": 4}):
    with pytest.raises(UserError, match="Llama shapes only"):
      rounds.llama_shape(dataclasses.replace(cfg, **change))
