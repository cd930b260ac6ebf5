"""Importance resampling of SFT's own responses: the optimum over whole responses, as samples allow.

With the baseline-relative reward, no transforms and no discount, `returns=reward_to_go` heads for
pi*(y | x) proportional to pi_sft(y | x) (pi_sft(y | x) / pi_ref(y | x))^alpha, alpha = 1 / beta. Of
n responses of pi_sft, one sampled with probability proportional to (pi_sft / pi_ref)^alpha follows
pi* as n grows. It costs n responses an answer and no training: what an optimizer of that objective
could reach, had it arrived. (`returns=per_token` heads for contrastive decoding instead.)

The effective number of samples, (sum w)^2 / sum w^2, tells how far to believe it: near n, pi* is
close to pi_sft; near 1, it lies where pi_sft hardly ever goes, and the answer is the best of n.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dpr_jax.evaluation.responses import Response, prompt_seeds
from dpr_jax.evaluation.scoring import Scorer
from dpr_jax.evaluation.systems import System
from dpr_jax.references.base import Reference
from dpr_jax.rollout.sampling import Sampling


def importance_weights(log_ratio_GxN: np.ndarray, alpha: float) -> np.ndarray:
  """Normalized weights of N responses to each of G prompts, float64 [G, N].

  Args:
    log_ratio_GxN: log pi_sft - log pi_ref of whole responses, nats.
    alpha: strength, 1 / beta.
  """
  log_w_GxN = alpha * np.asarray(log_ratio_GxN, np.float64)
  w_GxN = np.exp(log_w_GxN - log_w_GxN.max(axis=1, keepdims=True))
  return w_GxN / w_GxN.sum(axis=1, keepdims=True)


def effective_samples(w_GxN: np.ndarray) -> np.ndarray:
  """1 / sum w^2 of normalized weights, float64 [G], in [1, N]."""
  return 1.0 / np.square(w_GxN).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class ResampledSystem(System):
  """Answers with one of its first model's responses; see the module docstring."""

  reference: Callable[[], Reference] | None = None
  candidates: int = 16
  alpha: float = 1.0

  single = is_distribution = False

  def respond(
      self, members, responder, prompts, rng, *, temperature, seed, samples_per_prompt=1,
      on_batch=lambda n: None,
  ):
    if samples_per_prompt != 1:
      raise ValueError("a resampled system gives one response per prompt")
    candidates = responder.respond(
        members, prompts, rng, sampling=Sampling(temperature=temperature),
        samples_per_prompt=self.candidates, on_batch=on_batch,
    )
    responses, effective = resample(
        responder.scorer, members[0], self.reference(), prompts, candidates,
        alpha=self.alpha, seed=seed,
    )
    return responses, [{"effective_samples": float(x)} for x in effective]


def resample(
    scorer: Scorer, sft: object, ref: Reference, prompts: Sequence[np.ndarray],
    candidates: Sequence[Response], *, alpha: float, seed: int,
) -> tuple[list[Response], np.ndarray]:
  """One of the candidates of each prompt, sampled by its weight.

  Args:
    sft: variables of pi_sft, under which responses are scored again: both log-probs then come from
      the same program, whose rounding cancels in their difference.
    prompts: token ids, int32 [P_i] each.
    candidates: n responses per prompt, sampled from pi_sft at temperature 1, adjacent.
    seed: of the choices.

  Returns:
    (responses, effective number of samples float64 [G]).
  """
  n = len(candidates) // len(prompts)
  asked = [prompt for prompt in prompts for _ in range(n)]
  scores = scorer.score(sft, ref, asked, [c.tokens for c in candidates])
  log_ratio = [s.token_rewards.astype(np.float64).sum() for s in scores]
  w_GxN = importance_weights(np.reshape(log_ratio, (len(prompts), n)), alpha)
  # Inverse of the distribution function; the last column is 1 but for rounding.
  u_G = np.asarray([np.random.default_rng([seed, *s]).random() for s in prompt_seeds(prompts)])
  chosen_G = np.minimum((w_GxN.cumsum(axis=1) <= u_G[:, None]).sum(axis=1), n - 1)
  return [candidates[g * n + c] for g, c in enumerate(chosen_G)], effective_samples(w_GxN)
