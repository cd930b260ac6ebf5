"""Collectives of programs compiled for 8 devices, counted by `dpr_jax.planning.hlo`."""

import numpy as np
import pytest


def compiled_counts():
  """Counts and bytes of the collectives of small programs."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from dpr_jax.planning.hlo import collectives

  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  shape = lambda dims, *spec: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=on(*spec))
  lax = jax.lax

  def mapped(f, in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  P = PartitionSpec

  def loop(body, trips):
    def run(x):
      return lax.scan(lambda c, _: (mapped(body, P(), P())(c), None), x, None, length=trips)[0]

    return run

  def until(x):
    def body(s):
      return s[0] + 1, mapped(lambda v: lax.psum(v, "b") * 0.1, P(), P())(s[1])

    return lax.while_loop(lambda s: (s[0] < 9) & jnp.any(s[1] > 0.5), body, (0, x))[1]

  total = lambda v: lax.psum(v, "b") * 0.1
  programs = {
      "gather": (mapped(lambda v: lax.all_gather(v, "b", tiled=True), P("b"), P()),
                 shape((32, 8), "b")),
      "scatter": (mapped(lambda v: lax.psum_scatter(v, "b", tiled=True), P(), P("b")),
                  shape((32, 8))),
      "reduce": (mapped(lambda v: lax.psum(v, ("a", "b")), P(("a", "b")), P()),
                 shape((32, 8), ("a", "b"))),
      "permute": (mapped(lambda v: lax.ppermute(v, "a", [(0, 1), (1, 0)]), P("a"), P("a")),
                  shape((32, 8), "a")),
      "scanned": (loop(total, 7), shape((16,))),
      "nested": (loop(lambda v: lax.scan(lambda c, _: (total(c), None), v, None, length=3)[0], 5),
                 shape((16,))),
      "unknown": (until, shape((16,))),
      # Inserted by GSPMD: a contraction over a split dim all-reduces its result.
      "matmul": (lambda x: x @ x.T, shape((8, 32), None, "b")),
  }
  out = {}
  for name, (f, x) in programs.items():
    with jax.set_mesh(mesh):
      text = jax.jit(f, out_shardings=on("a") if name == "permute" else None).lower(x).compile()
    found = collectives(text.as_text(), 11)
    out[name] = [found.count, found.bytes, found.unknown_loops]
  return out


def test_collectives_are_counted_with_the_trips_of_their_loops(run_on_devices):
  found = run_on_devices(compiled_counts).result
  assert found == {
      "gather": [{"all-gather": 1}, {"all-gather": 32 * 8 * 4 * 3 / 4}, 0],
      "scatter": [{"reduce-scatter": 1}, {"reduce-scatter": 32 * 8 * 4 * 3 / 4}, 0],
      "reduce": [{"all-reduce": 1}, {"all-reduce": 2 * 4 * 8 * 4 * 7 / 8}, 0],
      "permute": [{"collective-permute": 1}, {"collective-permute": 16 * 8 * 4}, 0],
      "scanned": [{"all-reduce": 7}, {"all-reduce": 7 * 2 * 16 * 4 * 3 / 4}, 0],
      "nested": [{"all-reduce": 15}, {"all-reduce": 15 * 2 * 16 * 4 * 3 / 4}, 0],
      "unknown": [{"all-reduce": 11}, {"all-reduce": 11 * 2 * 16 * 4 * 3 / 4}, 1],
      "matmul": [{"all-reduce": 1}, {"all-reduce": 2 * 8 * 8 * 4 * 3 / 4}, 0],
  }


def steps_of_both_forms(shapes, dtype, vocab):
  """Three AdamW steps with the sharding of `models/embedding.py` and with that of plain JAX."""
  import dataclasses

  import flax.linen as nn
  import jax
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.config import OptimizerConfig
  from dpr_jax.data.batches import SFTBatch
  from dpr_jax.losses import make_sft_loss
  from dpr_jax.models import ModelConfig, Transformer, embedding, init_variables, logprobs
  from dpr_jax.training import TrainState, make_train_step
  from dpr_jax.training.optimizer import make_optimizer

  cfg = ModelConfig(vocab_size=vocab, hidden_size=32, mlp_size=64, num_layers=1, num_heads=4,
                    num_kv_heads=2, head_dim=8, tied_head=False)
  tokens = np.random.default_rng(0).integers(0, vocab, (8, 17)).astype(np.int32)
  batch = SFTBatch(tokens=tokens, segment_ids=np.ones_like(tokens),
                   loss_mask=np.ones(tokens.shape, np.float32))

  def cast_and_reshard(x, dtype, names, to, back):  # Without a custom backward pass.
    return sharding.constrain(x.astype(dtype), *to)

  axes, rows_move = embedding.logits_axes, embedding.rows_move
  gathered, stay = lambda *_: embedding.GATHERED_HEAD, lambda *_: False
  forms = {"ours": (dtype, sharding.reshard, rows_move, axes),
           "plain": (dtype, cast_and_reshard, stay, gathered),
           "exact": ("float32", cast_and_reshard, stay, gathered)}
  out = {"axes": []}
  boxed = jax.eval_shape(lambda key: init_variables(cfg, key), jax.random.key(0))
  for shape in shapes:
    mesh = sharding.make_mesh(*shape)
    placed = sharding.place(batch, mesh)
    for name, (how, sharding.reshard, embedding.rows_move, axes_of) in forms.items():
      embedding.logits_axes = logprobs.logits_axes = axes_of
      # Chunks of 4 columns on every mesh.
      budget = 3 * 4 * 8 * vocab * 4 / mesh.size / 2**30
      model = Transformer(dataclasses.replace(cfg, dtype=how, logits_budget=budget))
      optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, eps=1e-4), 10)
      step = make_train_step(make_sft_loss(model), optimizer)
      with jax.set_mesh(mesh):
        assert logprobs.chunk_columns(model.cfg, 8) == 4
        out["axes"].append(axes_of(8, 4, vocab))
        variables = jax.jit(lambda key: nn.unbox(init_variables(cfg, key)),
                            out_shardings=sharding.shardings_of(boxed, mesh))(jax.random.key(0))
        state = TrainState.create(variables, optimizer, jax.random.key(1))
        losses, norms = [], []
        for _ in range(3):
          state, metrics = step(state, placed)
          losses.append(float(metrics["loss"]))
          norms.append(float(metrics["grad_norm"]))
        params = [np.asarray(x, np.float64).ravel()[::7][:50].tolist()
                  for x in jax.tree.leaves(sharding.to_host(state.trainable))]
      out[f"{name} {shape}"] = dict(losses=losses, norms=norms, params=params)
  return out


def _flat(run):
  return np.concatenate([run["losses"], run["norms"], *run["params"]])


@pytest.mark.parametrize(("shapes", "dtype", "vocab", "form"), [
    ([[2, 2, 2]], "float32", 640, "fine_vocab"),
    ([[2, 2, 2]], "bfloat16", 640, "fine_vocab"),
    ([[2, 2, 2]], "float32", 32, "vocab"),
    pytest.param([[1, 8, 1], [1, 4, 2]], "float32", 640, "fine_vocab", marks=pytest.mark.slow),
], ids=["rows_move", "bfloat16", "head_moves", "more"])
def test_tables_on_their_shards_train_as_the_plain_form_does(
    run_on_devices, shapes, dtype, vocab, form
):
  # For the bytes on a TPU see tests/planning/test_plan.py.
  done = run_on_devices(steps_of_both_forms, shapes, dtype, vocab)
  assert [axes[-1] for axes in done.result["axes"]] == [form, "vocab", "vocab"] * len(shapes)
  assert "Involuntary full rematerialization" not in done.stderr
  for shape in shapes:
    ours, plain, exact = (_flat(done.result[f"{name} {shape}"]) for name in
                          ("ours", "plain", "exact"))
    if dtype == "float32":
      assert ours == pytest.approx(plain, rel=1e-6, abs=1e-6), shape
    else:  # The two forms round the gradient of a chunk at different places.
      assert np.mean(np.abs(ours - exact)) < 1.2 * np.mean(np.abs(plain - exact)), shape


def received(cfg, mesh, columns, chunk):
  """Bytes that a device receives for values and gradients of log-probs of 8 rows."""
  import dataclasses

  import jax
  import jax.numpy as jnp

  from dpr_jax import sharding
  from dpr_jax.models import Transformer
  from dpr_jax.models.logprobs import token_logprobs
  from dpr_jax.models.variables import abstract_variables
  from dpr_jax.planning.hlo import collectives

  rows = sharding.batch_sharding(mesh)
  tokens = jax.ShapeDtypeStruct((8, columns + 1), jnp.int32, sharding=rows)
  budget = 3 * 4 * 8 * cfg.vocab_size * chunk / mesh.size / 2**30
  cfg = dataclasses.replace(cfg, logits_budget=budget)
  variables = abstract_variables(cfg, mesh)

  def loss(variables, tokens):
    return token_logprobs(Transformer(cfg), variables, tokens).logp.sum()

  with jax.set_mesh(mesh):
    own = jax.tree.map(lambda x: x.sharding, variables)
    lowered = jax.jit(jax.grad(loss), out_shardings=own).lower(variables, tokens)
    return sum(collectives(lowered.compile().as_text()).bytes.values())


def bytes_of_heads():
  """Bytes by vocabulary and chunk, and by form of the head (chosen, gathered or fine)."""
  from dpr_jax import sharding
  from dpr_jax.models import ModelConfig, embedding, logprobs

  cfg = lambda vocab: ModelConfig(vocab_size=vocab, hidden_size=32, mlp_size=64, num_layers=1,
                                  num_heads=4, num_kv_heads=2, head_dim=8, tied_head=False)
  mesh = sharding.make_mesh(1, 8, 1)
  chunks = {f"{v} {c}": received(cfg(v), mesh, 64, c) for v in (4096, 8192) for c in (8, 64)}
  near, chosen = {}, embedding.logits_axes
  mesh = sharding.make_mesh(4, 2, 1)
  forms = {"ours": chosen, "gathered": lambda *_: embedding.GATHERED_HEAD,
           "fine": lambda *_: embedding.FINE_HEAD}
  for columns in (80, 400):
    for name, axes in forms.items():
      embedding.logits_axes = logprobs.logits_axes = axes
      near[f"{columns} {name}"] = received(cfg(1024), mesh, columns, columns)
  return chunks, near, 4 * 32 * 4096


def test_chunks_of_logits_do_not_gather_the_head_again(run_on_devices):
  chunks, near, table = run_on_devices(bytes_of_heads).result
  # More chunks or a larger vocabulary add only a fraction of the bytes of the head.
  for vocab in (4096, 8192):
    assert chunks[f"{vocab} 8"] - chunks[f"{vocab} 64"] < 8 * 3 * (vocab / 4096 * table) / 8
  assert chunks["8192 64"] - chunks["4096 64"] < table
  # The form that receives fewer bytes is chosen, on both sides of the break-even point.
  assert near["80 ours"] == near["80 fine"] < near["80 gathered"]
  assert near["400 ours"] == near["400 gathered"] < near["400 fine"]


def decoding():
  """Bytes received in sampling by number of new tokens, and the gathered variables."""
  import jax
  import jax.numpy as jnp

  from dpr_jax import sharding
  from dpr_jax.data.batches import PromptBatch
  from dpr_jax.models import ModelConfig, Transformer
  from dpr_jax.models.variables import abstract_variables, gathered
  from dpr_jax.planning.hlo import collectives
  from dpr_jax.rollout.sampler import generate

  cfg = ModelConfig(vocab_size=640, hidden_size=64, mlp_size=128, num_layers=1, num_heads=4,
                    num_kv_heads=2, head_dim=16, dtype="bfloat16")
  mesh = sharding.make_mesh(1, 4, 2)
  policy = abstract_variables(cfg, mesh)
  rows = sharding.batch_sharding(mesh)
  prompts = PromptBatch(tokens=jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=rows),
                        lengths=jax.ShapeDtypeStruct((8,), jnp.int32, sharding=rows))
  key = jax.eval_shape(lambda: jax.random.key(0))
  received = {}
  with jax.set_mesh(mesh):
    for new in (4, 20):
      step = jax.jit(lambda policy, prompts, key, new=new: generate(
          Transformer(cfg), (policy,), prompts, key, max_new_tokens=new, stop_ids=(1,)))
      found = collectives(step.lower(policy, prompts, key).compile().as_text(), new - 1)
      received[str(new)] = [found.bytes.get(k, 0) for k in ("all-gather", "all-to-all")]
    out = jax.jit(lambda v: gathered(cfg, v)).lower(policy).compile()
  specs = {}
  for (path, sharding_), x in zip(
      jax.tree_util.tree_leaves_with_path(out.output_shardings),
      jax.tree.leaves(jax.eval_shape(lambda v: gathered(cfg, v), policy)), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    specs[name] = ["fsdp" in str(sharding_.spec), "tensor" in str(sharding_.spec), str(x.dtype)]
  return received, specs, 2 * cfg.num_params


def test_decoding_gathers_the_weights_once_and_not_for_each_token(run_on_devices):
  received, specs, weights = run_on_devices(decoding).result
  (few, exchanged), (many, _) = received["4"], received["20"]
  assert few > weights / 2 * 3 / 4  # The gather itself: 3/4 of each half over tensor.
  assert many - few < 0.05 * weights
  assert exchanged == 0  # The embedding is gathered, so no activations move.
  for name, (fsdp, tensor, dtype) in specs.items():
    assert not fsdp, name
    if "norm" in name:
      assert dtype == "float32", name
    else:
      assert tensor and dtype == "bfloat16", name
