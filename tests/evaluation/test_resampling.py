"""Importance resampling against weights computed by hand, and counted draws."""

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.data.formats import Demo
from dpr_jax.data.loader import Prompts
from dpr_jax.evals import resampling
from dpr_jax.evals.responses import Response
from dpr_jax.evals.scoring import TokenScores, response_logps
from dpr_jax.evals.systems import controls, evaluate_system
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


@pytest.fixture
def mesh():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def test_weights_and_effective_samples(rng):
  log_ratio, alpha = rng.normal(0, 3, (4, 5)), rng.uniform(0.2, 3)
  weights = resampling.importance_weights(log_ratio + 1e4, alpha)  # No overflow.
  expected = np.exp(alpha * log_ratio)
  expected /= expected.sum(1, keepdims=True)
  np.testing.assert_allclose(weights, expected, rtol=1e-9)
  np.testing.assert_allclose(
      resampling.effective_samples(expected), [1 / sum(w * w for w in row) for row in expected]
  )
  assert resampling.effective_samples(np.full((1, 8), 1 / 8)) == pytest.approx(8)


def test_draws_follow_the_weights(rng, monkeypatch):
  groups, n, alpha = 20_000, 3, 0.7
  log_ratio = rng.normal(0, 1, n)
  ref_logp = rng.normal(-5, 1, n)
  candidates = [Response(np.asarray([i]), True, 0.0) for i in range(n)] * groups
  scores = [
      TokenScores(ref_logp[[i]] + log_ratio[[i]], ref_logp[[i]]) for i in range(n)
  ]
  monkeypatch.setattr(
      resampling, "score_responses",
      lambda model, sft, ref, prompts, responses, ensemble: [scores[int(r[0])] for r in responses],
  )
  seed = int(rng.integers(1000))
  chosen, effective = resampling.resample(
      None, None, None, [None] * groups, candidates, alpha=alpha, seed=seed
  )
  expected = np.exp(alpha * log_ratio) / np.exp(alpha * log_ratio).sum()
  shares = np.bincount([int(c.tokens[0]) for c in chosen], minlength=n) / groups
  assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / groups))
  np.testing.assert_allclose(effective, 1 / np.square(expected).sum())


def test_the_system_answers_with_one_of_its_candidates(mesh, make_model, rng):
  model, sft = make_model(1)
  _, ref = make_model(2)
  tokens = [rng.integers(8, 29, 4).astype(np.int32) for _ in range(3)]
  turn = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
  prompts = Prompts(tokens, [Demo(turn, "!", None, {}, source="test")] * 3, 0)
  load = {"sft": sft, "ref": ref}.__getitem__
  how = dict(tokenizer=byte_tokenizer(), verifier="exact", rng=jax.random.key(3), seed=5,
             stop_ids=(7,), prompt_length=8, max_new_tokens=5)

  def answers(alpha, candidates):
    (system,) = controls(["resampled"], alpha, 0.5, candidates=candidates)
    return evaluate_system(system, model, load, prompts, mesh=mesh, batch_size=4, **how)

  few, best = answers(0.0, 6), answers(1e6, 6)
  assert [r["effective_samples"] for r in few] == pytest.approx([6] * 3)
  for record, other, prompt in zip(best, few, tokens):  # All weight on the largest log-ratio.
    assert record["mode"] == "sampled" and record["effective_samples"] == pytest.approx(1)
    tokens = [np.asarray(r["token_ids"]) for r in (record, other)]
    logps = lambda variables, asked, tokens: np.asarray([
        x.sum()
        for x in response_logps(model, variables, [asked] * 2, tokens, mesh=mesh, batch_size=4)
    ])
    log_ratio = logps(sft, prompt, tokens) - logps(ref, prompt, tokens)
    assert log_ratio[0] >= log_ratio[1] - 1e-5
