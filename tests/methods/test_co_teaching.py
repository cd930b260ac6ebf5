"""Co-teaching against a naive selection, and against two plain trainings on what was selected."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax.data.batches import SFTBatch
from dpr_jax.keys import make_key
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.co_teaching import CoTeaching, CoTeachingStep, easy_mask
from dpr_jax.references.midrun import Midrun
from dpr_jax.training import make_train_step


@pytest.fixture
def batch(rng):
  """Rows of several demonstrations each, of which some tokens are trained; one row has none."""
  rows, length = 6, 14
  segments, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
  for row in range(rows - 1):
    edges = np.sort(rng.choice(np.arange(2, length), rng.integers(1, 4), replace=False))
    for number, (a, b) in enumerate(zip([0, *edges[:-1]], edges), start=1):
      segments[row, a:b] = number
      mask[row, a + 1 : b] = 1
  return SFTBatch(rng.integers(0, 29, (rows, length)).astype(np.int32), segments, mask)


@pytest.fixture
def losses():
  """losses(model, variables, batch): (row, segment) -> mean loss, one demonstration at a time."""

  @functools.partial(jax.jit, static_argnums=0)
  def logits_of(model, variables, tokens, segments):
    hidden, _ = model.apply(variables, tokens, None, segments)
    return model.apply(variables, hidden, method="unembed")[0]

  def of(model, variables, batch):
    out, length = {}, batch.tokens.shape[1]
    for row in range(len(batch.tokens)):
      for segment in range(1, batch.segment_ids[row].max() + 1):
        at = np.flatnonzero(batch.segment_ids[row] == segment)
        if not batch.loss_mask[row, at].any():
          continue
        tokens, ones = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
        tokens[0, : len(at)], ones[0, : len(at)] = batch.tokens[row, at], 1
        logits = np.asarray(logits_of(model, variables, tokens, ones), np.float64)
        logp = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        nll = [-logp[i - 1, tokens[0, i]] for i, t in enumerate(at) if batch.loss_mask[row, t]]
        out[row, segment] = np.mean(nll)
    return out

  return of


def chosen_mask(batch, of_each, share):
  best = sorted(of_each, key=of_each.get)[: int(np.ceil(share * len(of_each) - 1e-6))]
  keep = np.zeros_like(batch.loss_mask)
  for row, segment in best:
    keep[row] += batch.segment_ids[row] == segment
  return batch.loss_mask * keep


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4, 0.01])
def test_the_demonstrations_with_the_smallest_loss_are_kept(make_model, batch, losses, share):
  model, variables = make_model(3)
  got = easy_mask(model, variables, jax.tree.map(jnp.asarray, batch), jnp.float32(share))
  np.testing.assert_array_equal(got, chosen_mask(batch, losses(model, variables, batch), share))


def test_each_network_trains_on_what_the_other_finds_easy(make_model, batch, losses):
  model, variables = make_model(4)
  optimizer = optax.sgd(0.3)
  plain = make_train_step(make_sft_loss(model), optimizer, donate=False)
  step = CoTeachingStep(model, plain, noise_rate=0.5, ramp_steps=2.0)
  fresh = lambda: jax.tree.map(jnp.asarray, variables)
  state = step.init(fresh(), make_key(0))
  own, peer = (plain.init(fresh(), make_key(0)) for _ in range(2))
  halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
  on_device = lambda tree: jax.tree.map(jnp.asarray, tree)
  for share in (0.75, 0.5, 0.5):  # 1 - 0.5 min(T / 2, 1)
    masks = [chosen_mask(half, losses(model, judge.variables, half), share)
             for half, judge in zip(halves, (peer, own))]
    state, metrics = step(state, on_device(batch))
    own, of_own = plain(own, on_device(halves[0].replace(loss_mask=masks[0])))
    peer, of_peer = plain(peer, on_device(halves[1].replace(loss_mask=masks[1])))
    for got, expected in ((state.trainable, own.trainable),
                          (state.control["trainable"], peer.trainable)):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert metrics["loss"] == pytest.approx(float(of_own["loss"]), rel=1e-5)
    assert metrics["tokens"] == masks[0].sum() + masks[1].sum()
    assert metrics["kept_tokens"] == pytest.approx(masks[0].sum() / halves[0].loss_mask.sum())
  assert int(state.step) == int(state.control["step"]) == 3
  gap = jax.tree.map(lambda a, b: float(abs(a - b).max()), own.trainable, peer.trainable)
  assert max(jax.tree.leaves(gap)) > 1e-3  # They have read different rows.


def test_a_stage_resumes_both_networks_and_its_result_is_the_first(train_sft, with_config):
  def change(config):
    config.data.num_demos, config.data.corrupt = 60, 0.3
    config.sft.steps, config.sft.batch_size, config.sft.milestones = 4, 4, (0.5,)
    config.checkpoint.every, config.reference = 2, Midrun(fraction=0.5)
    config.compare = ("co_teaching",)

  run = train_sft(change, steps=False)
  method = CoTeaching(ramp=0.5)
  run = with_config(run, whole=method, parts=method)
  method.train(run, "whole")
  first = method.build(run, "parts")
  # An interrupted stage: its checkpoint of step 2 alone.
  whole, parts = run.workdir.stage("whole"), run.workdir.stage("parts")
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / "checkpoints" / "4")
  method.train(run, "parts")
  same = jax.tree.map(np.array_equal, run.result("whole"), run.result("parts"))
  assert all(jax.tree.leaves(same)) and first.step.noise_rate == 0.2
  lines = run.metrics("parts")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[0]["kept_tokens"] > lines[-1]["kept_tokens"]
  (program,) = method.programs(_shapes(run), "parts")
  assert program.resident_bytes > 3 * 4 * run.model.cfg.num_params * 0.99


def _shapes(run):
  from dpr_jax.methods.programs import Shapes

  return Shapes(run.config, run.model, run.mesh, run.stop_ids)
