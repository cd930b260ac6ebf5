"""Analytic FLOPs against XLA's own count of a program without loops, and of traced matmuls."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from dpr_jax.data.batches import SFTBatch, Shared
from dpr_jax.losses import FullVocabularyBatch, make_full_vocabulary_loss, make_sft_loss
from dpr_jax.methods.programs import RolloutWork
from dpr_jax.models import ModelConfig, Transformer
from dpr_jax.models.lora import LoRA, split_trainable
from dpr_jax.models.variables import abstract_variables
from dpr_jax.planning import flops
from dpr_jax.references.base import Reference
from dpr_jax.sharding import make_mesh

CFG = ModelConfig(vocab_size=4096, hidden_size=256, mlp_size=640, num_layers=1, num_heads=4,
                  num_kv_heads=2, head_dim=64, remat="none", tied_head=False)
ROWS, TOKENS = 2, 48


def _variables(cfg):
  mesh = make_mesh(devices=jax.devices()[:1])
  return abstract_variables(cfg, mesh)


def _gradient(cfg, chunk_size=TOKENS):
  """(function, arguments) of one backward pass of SFT, with logits in chunks of columns."""
  budget = (chunk_size + 0.5) * 3 * 4 * ROWS * cfg.vocab_size / 2**30
  loss_fn = make_sft_loss(Transformer(dataclasses.replace(cfg, logits_budget=budget)))
  shape = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
  batch = SFTBatch(shape, shape, jax.ShapeDtypeStruct(shape.shape, jnp.float32))
  trainable, frozen = split_trainable(_variables(cfg))
  grad = jax.grad(lambda t, f, b: loss_fn({**f, **t}, b, None)[0])
  return grad, (trainable, frozen, batch)


def matmul_flops(jaxpr) -> int:
  """FLOPs of every dot_general of a jaxpr, times the lengths of the scans around it."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
    for sub in jaxprs_in_params(eqn.params):
      total += matmul_flops(sub) * eqn.params.get("length", 1)
  return total


def test_a_forward_pass_against_xla():
  model = Transformer(CFG)

  def logits(variables, tokens):
    hidden, _ = model.apply(variables, tokens)
    return model.apply(variables, hidden, method="unembed")

  tokens = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
  cost = jax.jit(logits).lower(_variables(CFG), tokens).compile().cost_analysis()
  ours = flops.forward(CFG, ROWS, TOKENS, logits=TOKENS, full=True)
  # XLA also counts what is not a matmul: norms, softmax, rope.
  assert ours <= cost["flops"] <= 1.03 * ours
  traced = matmul_flops(jax.make_jaxpr(logits)(_variables(CFG), tokens).jaxpr)
  assert ours == traced


def test_a_train_step_against_xla():
  grad, arguments = _gradient(CFG)
  cost = jax.jit(grad).lower(*arguments).compile().cost_analysis()
  # In a single chunk XLA sees that the head is computed twice, and does so once.
  ours = flops.train(CFG, ROWS, TOKENS, TOKENS - 1, full=True)
  ours -= flops.head(CFG, ROWS * (TOKENS - 1))
  assert ours <= cost["flops"] <= 1.02 * ours


WINDOWED = {"layer_pattern": ("local", "global"), "window": 5, "num_layers": 5}


@pytest.mark.parametrize("fields", [
    {}, {"remat": "full"}, {"remat": "full", "sandwich_norm": True}, {"num_layers": 3},
    {"remat": "dots"}, {"lora": LoRA(rank=4)}, {"remat": "full", **WINDOWED},
    {"lora": LoRA(rank=4, targets=("query", "down")), "remat": "full"},
    {"lora": LoRA(rank=4, targets=("query",)), "remat": "full"},
], ids=str)
def test_a_train_step_against_its_trace(fields):
  cfg = dataclasses.replace(CFG, **fields)
  grad, arguments = _gradient(cfg, chunk_size=12)
  traced = matmul_flops(jax.make_jaxpr(grad)(*arguments).jaxpr)
  # 47 columns of logits are 4 chunks of 12: one is padding.
  assert traced == flops.train(cfg, ROWS, TOKENS, TOKENS, full=True)


def test_teachers_add_their_heads_forward_and_again():
  """Against the trace of an exact step with one reference: its chunks, computed twice."""
  model, states = Transformer(CFG), jax.ShapeDtypeStruct((ROWS, 24, CFG.hidden_size), jnp.float32)
  variables, shape = _variables(CFG), lambda *s, d=jnp.float32: jax.ShapeDtypeStruct(s, d)
  batch = FullVocabularyBatch(
      tokens=shape(ROWS, TOKENS, d=jnp.int32), segment_ids=shape(ROWS, TOKENS, d=jnp.int32),
      mask=shape(ROWS, 24), behaviour_logp=shape(ROWS, 24), beta=Shared(shape()),
      states=(states, states), models=Shared((variables, Reference((variables,)))),
  )
  loss = make_full_vocabulary_loss(model)
  grad = jax.grad(lambda v, b: loss(v, b, None)[0])
  traced = matmul_flops(jax.make_jaxpr(grad)(variables, batch).jaxpr)
  assert traced == flops.train(CFG, ROWS, TOKENS, 24, full=True, teachers=2)


def test_pairs_against_a_loop(rng):
  for _ in range(20):
    queries, past, window = (int(n) for n in rng.integers(1, 30, 3))
    seen = [(t, s) for t in range(past, past + queries) for s in range(t + 1)]
    assert flops.pairs(queries, past) == len(seen)
    assert flops.pairs(queries, past, window) == sum(t - s < window for t, s in seen)
    assert flops.pairs(queries, past, window, full=True) == queries * (past + queries)


def test_a_rollout_is_the_sum_of_its_forward_passes(rng):
  cfg = dataclasses.replace(CFG, **WINDOWED)
  rows, prompt, new = (int(n) for n in rng.integers(2, 9, 3))
  steps = sum(flops.forward(cfg, rows, 1, past=prompt + t, logits=1) for t in range(new - 1))
  want = flops.forward(cfg, rows, prompt, logits=1) + steps
  want += 2 * flops.forward(cfg, rows, prompt + new, logits=new)
  work = RolloutWork(rows, prompt, new, scored=2)
  assert flops.rollout(cfg, work) == want
  shared = 2 * rows * flops.forward(cfg, 1, prompt)  # of 3 samples a prompt, two prefills less.
  sampled = dataclasses.replace(work, rows=3 * rows, samples=3)
  assert flops.rollout(cfg, sampled) == 3 * want - shared
  again = flops.forward(cfg, rows, prompt + new, logits=new)
  assert flops.rollout(cfg, dataclasses.replace(work, scored=5)) == want + 3 * again


def test_slots_decode_in_waves(rng):
  """A loop over waves of slots and their steps; every slot computes in each."""
  rows, slots, prompt, new = (int(n) for n in rng.integers([5, 2, 2, 2], [20, 5, 9, 9]))
  decode, steps, left = 0, 0, rows
  while left > 0:
    decode += slots * flops.head(CFG, 1)
    for t in range(new - 1):
      decode += slots * flops.forward(CFG, 1, 1, past=prompt + t, logits=1)
      steps += 1
    left -= slots
  work = RolloutWork(rows, prompt, new, scored=0, slots=slots)
  assert work.steps == steps
  prefill = rows * flops.forward(CFG, 1, prompt)
  assert flops.rollout(CFG, work) == prefill + decode
  whole = dataclasses.replace(work, slots=0)
  for all_at_once in (0, rows, rows + 3):
    work = dataclasses.replace(work, slots=all_at_once)
    assert work.steps == new - 1
    assert flops.rollout(CFG, work) == flops.rollout(CFG, whole)
