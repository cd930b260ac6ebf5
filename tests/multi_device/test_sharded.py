"""A mesh of 8 forced host devices gives the same results as one device.

The programs below run in a separate process; see conftest.py.
"""

import pytest

MESHES = ((2, 2, 2), (1, 2, 4))
MORE_MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 1, 4))  # Slow: each one compiles.


def _setup(shape, devices):
  """(mesh, model, train_step, batch) of one mesh, the same values on each."""
  import numpy as np

  from dpr_jax import sharding
  from dpr_jax.config import OptimizerConfig
  from dpr_jax.data.batches import SFTBatch
  from dpr_jax.losses import make_sft_loss
  from dpr_jax.models import ModelConfig, Transformer
  from dpr_jax.training import make_train_step
  from dpr_jax.training.optimizer import make_optimizer

  # Chunks of 5 columns of the 4 rows of a micro-batch, on every mesh.
  ways, parts = shape[0] * shape[1], 2 if shape[2] == 2 else 1
  rows = 4 // ways if 4 % ways == 0 else 4
  budget = 3 * 4 * 5 * rows * (38 // parts) / 2**30
  # Two kv heads on tensor=4 and a vocabulary of 38 stay whole there; on tensor=2 they split.
  cfg = ModelConfig(vocab_size=38, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4,
                    num_kv_heads=2, head_dim=8, layer_pattern=("local", "global"), window=5,
                    logits_budget=budget)
  mesh = sharding.make_mesh(*shape, devices=devices)
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-4), 10)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 38, (8, 13)).astype(np.int32)
  segments = np.sort(rng.integers(1, 3, (8, 13)), axis=1).astype(np.int32)
  segments[:, 10:] *= rng.integers(0, 2, (8, 1)).astype(np.int32)
  mask = ((rng.random((8, 13)) < 0.7) & (segments > 0)).astype(np.float32)
  batch = sharding.place(SFTBatch(tokens=tokens, segment_ids=segments, loss_mask=mask), mesh)
  model = Transformer(cfg)
  step = make_train_step(make_sft_loss(model), optimizer, accumulation=2, ema_decay=0.5)
  return mesh, model, step, batch


def _variables(model, mesh, seed=0):
  import flax.linen as nn
  import jax

  from dpr_jax import sharding
  from dpr_jax.models import init_variables

  make = lambda key: jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x,
                                  nn.unbox(init_variables(model.cfg, key)))
  boxed = jax.eval_shape(lambda key: init_variables(model.cfg, key), jax.random.key(0))
  return jax.jit(make, out_shardings=sharding.shardings_of(boxed, mesh))(jax.random.key(seed))


def train(shapes):
  """Losses, gradient norms and parameters of 3 AdamW steps on each mesh, and on one device."""
  import jax
  import numpy as np

  from dpr_jax import sharding

  describe = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  runs = []
  for shape in [(1, 1, 1), *shapes]:
    devices = jax.devices()[: int(np.prod(shape))]
    mesh, model, step, batch = _setup(shape, devices)
    with jax.set_mesh(mesh):
      variables = _variables(model, mesh)
      abstract = step.abstract(describe(variables), jax.random.key(1))
      state = step.init(variables, jax.random.key(1))
      described = describe(state) == abstract
      before = jax.tree.map(lambda x: x.sharding, state)
      losses, norms = [], []
      for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
      kept = jax.tree.map(lambda x, s: x.sharding == s, state, before)
      # The query kernel [R, D, heads, head_dim] in the variables, both moments and the average.
      query = {
          "/".join(map(str, x.sharding.spec))
          for path, x in jax.tree_util.tree_leaves_with_path(
              (state.trainable, state.opt_state, state.ema)
          )
          if "layer_0/attention/query" in jax.tree_util.keystr(path, simple=True, separator="/")
      }
      runs.append(dict(
          losses=losses, norms=norms, compilations=step.compilations(),
          kept=bool(jax.tree.all(kept)), described=described,
          query=sorted(query),
          params=[np.asarray(x, np.float64).ravel()[:40].tolist()
                  for x in jax.tree.leaves(sharding.to_host((state.trainable, state.ema)))],
      ))
  return runs


def roll_out(shapes):
  """Rollout, advantages and two REINFORCE steps on each mesh, and on one device."""
  import functools

  import jax
  import numpy as np
  import optax

  from dpr_jax import sharding
  from dpr_jax.data.batches import PromptBatch
  from dpr_jax.losses import make_reinforce_loss, reinforce_batch
  from dpr_jax.rollout import make_rollout_step
  from dpr_jax.training import TrainState, make_train_step

  rng = np.random.default_rng(5)
  lengths = np.array([4, 1, 0, 3, 2, 4, 1, 3], np.int32)
  prompts = PromptBatch(tokens=rng.integers(0, 38, (8, 4)).astype(np.int32), lengths=lengths)
  runs = []
  for shape in [(1, 1, 1), *shapes]:
    mesh, model, _, _ = _setup(shape, jax.devices()[: int(np.prod(shape))])
    optimizer = optax.sgd(0.1)  # Adam would divide rounding by the size of a small gradient.
    with jax.set_mesh(mesh):
      policy, sft, ref = (_variables(model, mesh, seed) for seed in (0, 1, 2))
      rollout_step = make_rollout_step(model, max_new_tokens=6, stop_ids=(1, 2, 3))
      rollout = rollout_step(policy, sft, ref, sharding.place(prompts, mesh), jax.random.key(7))
      refill = make_rollout_step(
          model, max_new_tokens=6, stop_ids=(1, 2, 3), samples_per_prompt=2, slots=8, refill=0.01
      )
      refilled = refill(policy, sft, ref, sharding.place(prompts, mesh), jax.random.key(7))
      make_batch = functools.partial(reinforce_batch, variance_baseline="position_mean")
      batch, _ = jax.jit(functools.partial(make_batch, beta=0.5))(rollout)
      step = make_train_step(make_reinforce_loss(model), optimizer, accumulation=2)
      state = TrainState.create(policy, optimizer, jax.random.key(1))
      losses = []
      for _ in range(2):
        state, metrics = step(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
      rows = sharding.batch_sharding(mesh)
      runs.append(dict(
          tokens=np.asarray(rollout.tokens).tolist(), lengths=np.asarray(rollout.lengths).tolist(),
          rewards=np.asarray(rollout.rewards).tolist(), losses=losses,
          refilled=np.asarray(refilled.tokens).tolist(),
          refilled_rewards=np.asarray(refilled.rewards).tolist(),
          by_rows=[
              x.sharding.is_equivalent_to(rows, x.ndim)
              for x in jax.tree.leaves((rollout, refilled, batch)) if x.ndim
          ],
          compilations=step.compilations(),
      ))
  return runs


def save_and_restore(directory, shapes):
  """Saves on the first mesh and restores on the others; True if all bits are equal."""
  import jax
  import numpy as np
  import optax
  from jax.sharding import NamedSharding

  from dpr_jax import sharding
  from dpr_jax.training import TrainState
  from dpr_jax.training.checkpoints import Checkpoints
  from dpr_jax.training.steps import abstract_state

  axes = {"table": ("vocab", "embed"), "kernel": ("layers", "embed", "heads", "head_dim")}
  rng = np.random.default_rng(0)
  values = {
      "table": rng.normal(size=(40, 16)).astype(np.float32),
      "kernel": rng.normal(size=(3, 16, 4, 2)).astype(np.float32),
  }
  optimizer, key = optax.adamw(0.1), jax.random.key(3)
  carried = {"ema": True, "control": {"beta": 0.7}}
  host = lambda s: [np.asarray(x) for x in jax.tree.leaves(sharding.to_host(
      (s.trainable, s.opt_state, jax.random.key_data(s.rng), s.ema, s.control)))]
  saved, out = None, []
  for shape in shapes:
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
      own = {
          k: NamedSharding(mesh, sharding.resolve(axes[k], v.shape, mesh))
          for k, v in values.items()
      }
      if saved is None:
        state = TrainState.create(
            {"params": jax.device_put(values, own)}, optimizer, key, **carried
        )
        moments = jax.tree.map(
            lambda x: x + 1 if x.ndim else x, state.opt_state  # Not the zeros of a new state.
        )
        state = state.replace(opt_state=moments)
        with Checkpoints(directory) as checkpoints:
          checkpoints.save(state, 1, {"next_step": 1})
        saved = host(state)
        continue
      like = {"params": {
          k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=own[k]) for k, v in values.items()
      }}
      with Checkpoints(directory, read_only=True) as checkpoints:
        state, data = checkpoints.restore(abstract_state(like, optimizer, key, **carried))
      same = all(np.array_equal(a, b) for a, b in zip(saved, host(state), strict=True))
      laid_out = all(state.trainable["params"][k].sharding == own[k] for k in own)
      arrays = [x for x in jax.tree.leaves((state.opt_state, state.ema)) if x.ndim]
      split = all(not x.sharding.is_fully_replicated for x in arrays) or shape == [1, 1, 1]
      out.append([same, laid_out, split, data])
  return out


def _quiet(stderr):
  """Checks that the partitioner gathered no whole array and that all donations were used."""
  for warning in ("Involuntary full rematerialization", "not used: donated"):
    assert warning not in stderr, stderr


@pytest.mark.parametrize("meshes", [MESHES, pytest.param(MORE_MESHES, marks=pytest.mark.slow)],
                         ids=["some", "more"])
def test_training_on_a_mesh_equals_one_device(run_on_devices, meshes):
  done = run_on_devices(train, meshes)
  alone, *sharded = done.result
  assert alone["losses"][2] < alone["losses"][0]
  for shape, run in zip(meshes, sharded, strict=True):
    assert run["losses"] == pytest.approx(alone["losses"], rel=1e-5), shape
    assert run["norms"] == pytest.approx(alone["norms"], rel=1e-5), shape
    for ours, theirs in zip(run["params"], alone["params"], strict=True):
      assert ours == pytest.approx(theirs, abs=1e-5), shape
    assert run["described"], f"{shape}: the state is not what its step describes"
    assert run["kept"], f"{shape}: the returned state lost its shardings"
    assert run["compilations"] == 1, shape
    assert run["query"] == ["None/fsdp/tensor/None"], shape
  _quiet(done.stderr)


@pytest.mark.parametrize("meshes", [MESHES[:1], pytest.param(MORE_MESHES, marks=pytest.mark.slow)],
                         ids=["one", "more"])
def test_rollouts_on_a_mesh_equal_one_device(run_on_devices, meshes):
  done = run_on_devices(roll_out, meshes)
  alone, *sharded = done.result
  assert len(set(alone["lengths"])) > 2
  for shape, run in zip(meshes, sharded, strict=True):
    assert run["tokens"] == alone["tokens"] and run["lengths"] == alone["lengths"], shape
    assert run["refilled"] == alone["refilled"], f"{shape}: refilled slots sampled other tokens"
    both = (run["rewards"] + run["refilled_rewards"], alone["rewards"] + alone["refilled_rewards"])
    for ours, theirs in zip(*both, strict=True):
      assert ours == pytest.approx(theirs, abs=1e-5), shape
    for ours, theirs in zip(run["losses"], alone["losses"], strict=True):
      assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), shape
    assert all(run["by_rows"]), f"{shape}: rollouts are not sharded by rows"
    assert run["compilations"] == 1, shape
  _quiet(done.stderr)


def test_a_checkpoint_is_read_by_any_mesh(run_on_devices, tmp_path):
  meshes = (MESHES[0], (1, 8, 1), (2, 1, 4), (1, 1, 1))
  done = run_on_devices(save_and_restore, str(tmp_path / "checkpoints"), meshes)
  assert done.result == [[True, True, True, {"next_step": 1}]] * 3
