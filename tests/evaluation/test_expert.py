"""KLs to a known expert against float64 numpy, one response at a time."""

import functools

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.evaluation.expert import equal_length_logp, score_against_expert
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.systems import System
from dpr_jax.loading import LoadedModel
from dpr_jax.models.logprobs import chunk_columns

V = 29


@pytest.fixture(scope="module", autouse=True)
def mesh():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def rows(rng):
  """Prompts and responses of many lengths, one token among them."""
  draw = lambda lengths: [rng.integers(0, V, n).astype(np.int32) for n in lengths]
  return draw((3, 1, 6, 2, 9)), draw((4, 1, 7, 12, 2))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, variables, tokens):
  hidden, _ = model.apply(variables, tokens)
  return model.apply(variables, hidden, method="unembed")


def _logits(model, variables, row):
  """float64 [T, V]; what is put behind the row, for few shapes, is not seen by it."""
  tokens = np.pad(row, (0, 24 - len(row)))
  return np.asarray(_apply(model, variables, tokens[None]), np.float64)[0, : len(row)]


def _log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _naive(logits_of, expert_of, prompt, response):
  """(reverse KL, forward KL, log p of the expert) of each state, [T]."""
  row, out = np.concatenate([prompt, response]), []
  p, q = _log_softmax(logits_of(row)), _log_softmax(expert_of(row))
  for t in range(len(prompt), len(row)):
    a, b = p[t - 1], q[t - 1]
    out.append((np.exp(a) @ (a - b), np.exp(b) @ (b - a), b[row[t]]))
  return np.asarray(out).T


def _system(weights=(1.0,), temperature=1.0):
  return System("s", load=None, weights=weights, temperature=temperature)


def _loaded(model, variables):
  return LoadedModel(model, variables, None, (), "", {})


@pytest.mark.parametrize("weights,temperature,columns", [
    ((1.0,), 1.0, 128), ((2.0, -1.0), 0.7, 5),
])
def test_kls_equal_float64_numpy(make_model, mesh, rng, rows, weights, temperature, columns):
  seeds = rng.integers(2**31, size=3).tolist()
  expert, theirs = make_model(seeds[0], num_layers=3, hidden_size=24)
  # Rows of two, and the logits of all members and of the expert at a time.
  budget = 3 * 4 * columns * 2 * (len(weights) + 1) * V / 2**30
  models = [make_model(seed, logits_budget=budget) for seed in seeds[1 : 1 + len(weights)]]
  model, members = models[0][0], [variables for _, variables in models]
  assert chunk_columns(model.cfg, 2, len(weights) + 1) == columns
  seen = []
  scorer = Scorer(model, mesh, 2, on_batch=seen.append)
  system = _system(weights, temperature)
  found = score_against_expert(scorer, system, members, _loaded(expert, theirs), *rows)
  assert sum(seen) == len(rows[0]) == len(found)

  def logits(row):
    return sum(w * _logits(model, m, row) for w, m in zip(weights, members)) / temperature

  for scores, prompt, response in zip(found, *rows):
    want = _naive(logits, lambda row: _logits(expert, theirs, row), prompt, response)
    assert want[:2].min() > 1e-3  # far enough for the tolerance to mean something.
    for ours, exact in zip((scores.reverse_kl, scores.forward_kl, scores.expert_logp), want):
      assert ours.dtype == np.float32 and ours.shape == response.shape
      np.testing.assert_allclose(ours, exact, atol=2e-5, rtol=2e-5)


def test_the_expert_is_no_distance_from_itself(make_model, mesh, rng, rows):
  model, variables = make_model(int(rng.integers(2**31)), num_layers=3)
  scorer, expert = Scorer(model, mesh, 4), _loaded(model, variables)
  for scores in score_against_expert(scorer, _system(), [variables], expert, *rows):
    np.testing.assert_allclose(scores.reverse_kl, 0.0, atol=1e-6)
    np.testing.assert_allclose(scores.forward_kl, 0.0, atol=1e-6)
    assert scores.expert_logp.max() < 0


def test_two_systems_are_compared_at_equal_length():
  """Of each prompt as many tokens count as the shorter response has."""
  sft = [[-1.0, -2.0, -30.0], [-4.0]]
  dpr = [[-3.0, -1.0], [-1.0, -2.0, -3.0]]
  assert equal_length_logp(sft, dpr).tolist() == [-1.5, -4.0]
  assert equal_length_logp(dpr, sft).tolist() == [-2.0, -1.0]
  assert equal_length_logp(sft, sft).tolist() == [-11.0, -4.0]
