"""Importance resampling against weights computed by hand, and counted choices."""

import types

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.evaluation import resampling
from dpr_jax.evaluation.resampling import ResampledSystem
from dpr_jax.evaluation.responses import Responder, Response
from dpr_jax.evaluation.token_scores import TokenScores
from dpr_jax.references.base import Reference


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


def test_choices_follow_the_weights(rng):
  groups, n, alpha = 20_000, 3, 0.7
  log_ratio = rng.normal(0, 1, n)
  ref_logp = rng.normal(-5, 1, n)
  candidates = [Response(np.asarray([i]), True, 0.0) for i in range(n)] * groups
  scores = [
      TokenScores(ref_logp[[i]] + log_ratio[[i]], ref_logp[[i]]) for i in range(n)
  ]
  scorer = types.SimpleNamespace(
      score=lambda sft, ref, prompts, responses: [scores[int(r[0])] for r in responses]
  )
  seed = int(rng.integers(1000))
  chosen, effective = resampling.resample(
      scorer, None, None, [np.asarray([g]) for g in range(groups)], candidates, alpha=alpha,
      seed=seed,
  )
  expected = np.exp(alpha * log_ratio) / np.exp(alpha * log_ratio).sum()
  shares = np.bincount([int(c.tokens[0]) for c in chosen], minlength=n) / groups
  assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / groups))
  np.testing.assert_allclose(effective, 1 / np.square(expected).sum())


def test_the_system_answers_with_one_of_its_candidates(mesh, make_model, rng):
  model, sft = make_model(1)
  _, ref = make_model(2)
  prompts = [rng.integers(8, 29, 4).astype(np.int32) for _ in range(3)]
  responder = Responder(model, mesh, 4, prompt_length=8, max_new_tokens=5, stop_ids=(7,))

  def answers(alpha, candidates):
    system = ResampledSystem(
        "r", load=lambda: (sft,), modes=("sampled",), reference=lambda: Reference.of(ref),
        candidates=candidates, alpha=alpha,
    )
    assert not system.single and not system.is_distribution and not system.on_frontier
    return system.respond(
        system.load(), responder, prompts, jax.random.key(3), temperature=1.0, seed=5
    )

  (few, effective), (best, alone) = answers(0.0, 6), answers(1e6, 6)
  assert [r["effective_samples"] for r in effective] == pytest.approx([6] * 3)
  assert [r["effective_samples"] for r in alone] == pytest.approx([1] * 3)
  for response, other, prompt in zip(best, few, prompts):  # All weight on the largest log-ratio.
    rows = [prompt] * 2, [r.tokens for r in (response, other)]
    log_p, log_q = (responder.scorer.logps(variables, *rows) for variables in (sft, ref))
    log_ratio = [a.sum() - b.sum() for a, b in zip(log_p, log_q)]
    assert log_ratio[0] >= log_ratio[1] - 1e-5
  with pytest.raises(ValueError, match="one response per prompt"):
    ResampledSystem("r", load=None).respond(
        (sft,), responder, prompts, jax.random.key(3), temperature=1.0, seed=5,
        samples_per_prompt=2,
    )
