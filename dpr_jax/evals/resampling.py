"""Importance resampling of SFT's own responses: the optimum over whole responses, as samples allow.

With the baseline-relative reward, no transforms and no discount, `returns=reward_to_go` heads for
pi*(y | x) proportional to pi_sft(y | x) (pi_sft(y | x) / pi_ref(y | x))^alpha, alpha = 1 / beta. Of
n responses of pi_sft, one drawn with a probability proportional to (pi_sft / pi_ref)^alpha follows
pi* as n grows. It costs n responses an answer and no training: what an optimizer of that objective
could reach, had it arrived. (`returns=per_token` heads for contrastive decoding instead.)

The effective number of samples, (sum w)^2 / sum w^2, tells how far to believe it: near n, pi* is
close to pi_sft; near 1, it lies where pi_sft hardly ever goes, and the answer is the best of n.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpr_jax.evals.responses import Response
from dpr_jax.evals.scoring import score_responses


def importance_weights(log_ratio_GxN: np.ndarray, alpha: float) -> np.ndarray:
  """Normalised weights of N responses to each of G prompts, float64 [G, N].

  Args:
    log_ratio_GxN: log pi_sft - log pi_ref of whole responses, nats.
    alpha: strength, 1 / beta.
  """
  log_w_GxN = alpha * np.asarray(log_ratio_GxN, np.float64)
  w_GxN = np.exp(log_w_GxN - log_w_GxN.max(axis=1, keepdims=True))
  return w_GxN / w_GxN.sum(axis=1, keepdims=True)


def effective_samples(w_GxN: np.ndarray) -> np.ndarray:
  """1 / sum w^2 of normalised weights, float64 [G], in [1, N]."""
  return 1.0 / np.square(w_GxN).sum(axis=1)


def resample(
    model: Any,
    sft: Any,
    ref: Any,
    prompts: Sequence[np.ndarray],
    candidates: Sequence[Response],
    *,
    alpha: float,
    seed: int,
    ensemble: str = "",
    **how: Any,
) -> tuple[list[Response], np.ndarray]:
  """One of the candidates of each prompt, drawn by its weight.

  Args:
    sft: variables of pi_sft, under which responses are scored again: both log-probs then come from
      the same program, whose rounding cancels in their difference.
    ref: variables of the reference, a tuple of them for an ensemble.
    prompts: token ids, int32 [P_i] each.
    candidates: n responses a prompt, sampled from pi_sft at temperature 1, adjacent.
    seed: of the draws.
    how: see `evals.scoring.response_values`.

  Returns:
    (responses, effective number of samples float64 [G]).
  """
  n = len(candidates) // len(prompts)
  asked = [prompt for prompt in prompts for _ in range(n)]
  tokens = [c.tokens for c in candidates]
  scores = score_responses(model, sft, ref, asked, tokens, ensemble=ensemble, **how)
  log_ratio = [s.token_rewards.astype(np.float64).sum() for s in scores]
  w_GxN = importance_weights(np.reshape(log_ratio, (len(prompts), n)), alpha)
  # Inverse of the distribution function; the last column is 1 but for rounding.
  u_G = np.random.default_rng(seed).random(len(prompts))
  chosen_G = np.minimum((w_GxN.cumsum(axis=1) <= u_G[:, None]).sum(axis=1), n - 1)
  return [candidates[g * n + c] for g, c in enumerate(chosen_G)], effective_samples(w_GxN)
