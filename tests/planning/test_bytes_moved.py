"""Bytes counted by formula against the arrays that the programs have."""

import dataclasses

import jax
import numpy as np
import pytest

from dpr_jax.methods.programs import RolloutWork, TrainWork
from dpr_jax.models import ModelConfig
from dpr_jax.models.cache import init_cache
from dpr_jax.models.variables import abstract_variables
from dpr_jax.planning import bytes_moved
from dpr_jax.sharding import make_mesh

CFG = ModelConfig(vocab_size=96, hidden_size=32, mlp_size=48, num_layers=3, num_heads=4,
                  num_kv_heads=2, head_dim=8, tied_head=False, dtype="bfloat16",
                  layer_pattern=("local", "global"), window=5)


def _bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_step_of_decoding_reads_the_whole_cache(rng):
  rows, prompt, new, scored = (int(n) for n in rng.integers(2, 9, 4))
  kv = jax.eval_shape(lambda: init_cache(CFG, rows, new, prompt=prompt)).kv
  assert bytes_moved.cache_bytes(CFG, 1, rows, prompt + new) == _bytes(kv)
  variables = abstract_variables(CFG, make_mesh(devices=jax.devices()[:1]), "bfloat16")
  want = (new - 1) * (_bytes(kv) + _bytes(variables)) + (1 + scored) * _bytes(variables)
  assert bytes_moved.rollout(CFG, 1, rows, RolloutWork(rows, prompt, new, scored)) == want


def test_slots_read_fewer_rows_in_more_steps(rng):
  rows, slots, prompt, new = 12, 4, 6, int(rng.integers(3, 9))
  whole = RolloutWork(rows, prompt, new, scored=2)
  queued = dataclasses.replace(whole, slots=slots)
  move = lambda n, work: bytes_moved.rollout(CFG, 1, n, work)
  cached = lambda n, work: move(n, work) - move(0, work)
  assert queued.steps == 3 * whole.steps == 3 * (new - 1)
  assert cached(slots, queued) == cached(rows, whole)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [10**7, 3], ids=["weights_move", "activations_move"])
def test_the_minimum_is_what_others_hold_of_each_weight_or_activation(tied, tokens):
  cfg, n, parts = dataclasses.replace(CFG, tied_head=tied), 4, 3
  logits = tokens - 1
  variables = abstract_variables(cfg, make_mesh(devices=jax.devices()[:1]), "bfloat16")
  least = bytes_moved.minimum_received(cfg, n, parts, tokens, logits)
  received = np.zeros(3)  # Forward, backward, gradients.
  for path, x in jax.tree_util.tree_leaves_with_path(variables):
    others = x.size * 2 * (n - 1) / n
    name = jax.tree_util.keystr(path)
    if tokens > 3 or "table" not in name:
      read_backward = tied or "embed" not in name
      received += [parts * others, parts * others * read_backward, others]
  if tokens == 3:
    activation = 2 * cfg.hidden_size
    # Those of all others at the head, and of cotangents; their columns of mine at the lookup.
    received += parts * (n - 1) * logits * activation
    received[[0, 2]] += parts * (n - 1) / n * tokens * activation
  assert list(least.values()) == pytest.approx(received, rel=1e-12)
  assert list(least) == ["gathered_forward", "gathered_backward", "gradients_reduced"]
  assert set(bytes_moved.minimum_received(cfg, 1, parts, tokens, logits).values()) == {0.0}


def test_teachers_read_their_heads_twice_in_each_micro_batch():
  plain = TrainWork(8, 6, 4, accumulation=2)
  head = _bytes(abstract_variables(CFG, make_mesh(devices=jax.devices()[:1]), "bfloat16")
                ["params"]["head"])
  moved = [bytes_moved.train(CFG, 1, 8, dataclasses.replace(plain, teachers=n), 0.0)
           for n in (0, 3)]
  assert moved[1] - moved[0] == 3 * 2 * 2 * head
