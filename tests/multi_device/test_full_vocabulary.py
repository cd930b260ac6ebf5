"""The exact gradient on a mesh of 8 forced host devices equals that of one device.

The program below runs in a process of its own; see conftest.py.
"""

import pytest

# The head is exchanged in parts over fsdp and tensor on the first, and gathered over fsdp on the
# other, which is slow.
AXES = {(2, 2, 2): "fine_vocab", (1, 2, 4): "vocab"}
VOCAB, HIDDEN = 44, 32  # No other dim is 44.


def train(shapes):
  """Scores with their states and two exact steps on each mesh, and on one device."""
  import dataclasses

  import flax.linen as nn
  import jax
  import numpy as np
  import optax

  from benchmarks.programs import largest_logits
  from dpr_jax import sharding
  from dpr_jax.data.batches import Shared
  from dpr_jax.losses import FullVocabularyBatch, make_full_vocabulary_loss
  from dpr_jax.models import ModelConfig, Transformer, init_variables
  from dpr_jax.models.embedding import logits_axes
  from dpr_jax.models.logprobs import chunk_columns
  from dpr_jax.references.base import Reference
  from dpr_jax.rollout.scoring import score_response
  from dpr_jax.training import TrainState, make_train_step

  cfg = ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN, mlp_size=48, num_layers=1, num_heads=4,
                    num_kv_heads=2, head_dim=8)
  boxed = jax.eval_shape(lambda key: init_variables(cfg, key), jax.random.key(0))
  make = lambda key: jax.tree.map(lambda x: x * 2.0 if x.ndim > 1 else x,
                                  nn.unbox(init_variables(cfg, key)))
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, VOCAB, (8, 10)).astype(np.int32)
  prompts, lengths = rng.integers(1, 5, (8, 1)), rng.integers(0, 7, (8, 1))
  column = np.arange(10)
  segments = ((column >= 4 - prompts) & (column < 4 + lengths)).astype(np.int32)
  rows = (tokens, segments, segments[:, 4:].astype(np.float32))
  runs = []
  for shape in [(1, 1, 1), *shapes]:
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    # Two columns of four models for the four rows of a micro-batch, however they are split.
    model = Transformer(
        dataclasses.replace(cfg, logits_budget=3 * 4 * 2 * 4 * 4 * VOCAB / np.prod(shape) / 2**30)
    )
    with jax.set_mesh(mesh):
      init = jax.jit(make, out_shardings=sharding.shardings_of(boxed, mesh))
      policy, sft, *refs = (init(jax.random.key(seed)) for seed in range(4))
      ref = Reference(tuple(refs))
      tokens, segments, mask = sharding.place(rows, mesh)
      scored = jax.jit(lambda *x, model=model: score_response(
          model, policy=x[0], sft=x[1], ref=x[2], tokens_BxS=x[3], segment_ids_BxS=x[4], start=4,
          keep_states=True,
      ))(policy, sft, ref, tokens, segments)
      batch = FullVocabularyBatch(
          tokens=tokens, segment_ids=segments, mask=mask, behaviour_logp=scored.policy.logp,
          beta=Shared(jax.numpy.float32(0.5)), states=scored.states, models=Shared((sft, ref)),
      )
      optimizer = optax.sgd(0.1)  # Adam would divide rounding by the size of a small gradient.
      step = make_train_step(make_full_vocabulary_loss(model), optimizer, accumulation=2)
      state = TrainState.create(policy, optimizer, jax.random.key(1))
      text = step.lower(state, batch).compile().as_text()
      found = []
      for _ in range(2):
        state, metrics = step(state, batch)
        found.append([float(metrics[name]) for name in (
            "loss", "grad_norm", "kl_to_target", "decode_gap")])
      by_rows = sharding.batch_sharding(mesh)
      runs.append(dict(
          found=found,
          by_rows=all(x.sharding.is_equivalent_to(by_rows, x.ndim) for x in scored.states),
          columns=chunk_columns(model.cfg, 4, 4), axis=logits_axes(4, 2, VOCAB)[-1],
          whole=largest_logits(text, VOCAB, HIDDEN)[0], compilations=step.compilations(),
      ))
  return runs


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_exact_steps_on_a_mesh_equal_one_device_and_gather_no_logits(run_on_devices, shape):
  done = run_on_devices(train, [shape])
  alone, run = done.result
  assert alone["columns"] == 2
  assert alone["whole"] == 2 * 4 * 2 * VOCAB  # A chunk of two references, as they are combined.
  assert alone["found"][1][2] < alone["found"][0][2]
  for ours, theirs in zip(run["found"], alone["found"], strict=True):
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
  assert run["axis"] == AXES[shape]
  assert run["columns"] == 2 and run["by_rows"] and run["compilations"] == 1
  assert run["whole"] == 0, "an array of logits has the whole vocabulary"
  for warning in ("Involuntary full rematerialization", "not used: donated"):
    assert warning not in done.stderr, done.stderr
