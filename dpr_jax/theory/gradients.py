"""Policy-gradient estimators on tables: their exact mean and variance, by enumeration.

One sampled response y gives sum_t w_t(y) d log pi(y_t | s_t) / d logits. For a table,
d log pi(a | s) / d logits(s, .) = onehot(a) - pi(. | s). Prompts are uniform. Dims as in `mdp.py`.
"""

import numpy as np

from dpr_jax.theory.mdp import TokenMDP, log_softmax, sequence_logp, token_logp
from dpr_jax.theory.values import state_kl, visits


def reward_to_go(rewards_YxT: np.ndarray) -> np.ndarray:
  """sum_{k >= t} r_k, for rewards that are 0 past the end."""
  return np.cumsum(rewards_YxT[:, ::-1], axis=1)[:, ::-1]


def full_return(rewards_YxT: np.ndarray) -> np.ndarray:
  """sum_k r_k at every token."""
  return np.broadcast_to(np.sum(rewards_YxT, axis=1, keepdims=True), rewards_YxT.shape)


def score_gradients(mdp: TokenMDP, logits_SxA: np.ndarray, weights_YxT: np.ndarray) -> np.ndarray:
  """[Y, S, A], the estimate that each response gives: sum_t w_t d log pi(y_t | s_t)."""
  y = mdp.responses
  pi_SxA = np.exp(log_softmax(logits_SxA))
  out = np.zeros((len(y.lengths_Y), mdp.num_states, mdp.vocab_size))
  for row, t in zip(*np.nonzero(y.mask_YxT)):
    s, a = y.states_YxT[row, t], y.tokens_YxT[row, t]
    out[row, s] -= weights_YxT[row, t] * pi_SxA[s]
    out[row, s, a] += weights_YxT[row, t]
  return out


def moments(
    mdp: TokenMDP, logits_SxA: np.ndarray, gradients_YxSxA: np.ndarray
) -> tuple[np.ndarray, float]:
  """(mean [S, A], trace of the covariance) of an estimate from one response to one prompt."""
  p_Y = np.exp(sequence_logp(mdp, logits_SxA)) / mdp.num_prompts
  mean_SxA = np.tensordot(p_Y, gradients_YxSxA, axes=1)
  second = float(np.sum(p_Y * np.sum(np.square(gradients_YxSxA), axis=(1, 2))))
  return mean_SxA, second - float(np.sum(np.square(mean_SxA)))


KL_FORMS = ("k1_loss", "k2_loss", "full_loss", "k1_reward")


def kl_gradient(
    mdp: TokenMDP, logits_SxA: np.ndarray, other_SxA: np.ndarray, form: str
) -> np.ndarray:
  """[S, A], expected gradient of a KL(pi || other) estimated on responses sampled from pi.

  Args:
    form: one of KL_FORMS, with d(t) = log pi(y_t | s_t) - log other(y_t | s_t):
      k1_loss    differentiates sum_t d(t) at the samples. Expectation 0: it regularises nothing.
      k2_loss    differentiates sum_t d(t)^2 / 2 at the samples.
      full_loss  differentiates the KL over the whole vocabulary in each state passed. The same
                 expectation as k2_loss: the gradient of sum_s d_pi(s) KL(s) with the visits d_pi
                 held fixed, so it ignores which states the policy chooses to reach.
      k1_reward  the score function times sum_{k >= t} d(k), the KL in the reward: the gradient
                 of the KL of whole responses, visits included.

  Raises:
    ValueError: another name.
  """
  log_pi, log_other = log_softmax(logits_SxA), log_softmax(other_SxA)
  if form == "full_loss":
    kl_S = state_kl(logits_SxA, other_SxA)
    by_state = np.exp(log_pi) * (log_pi - log_other - kl_S[:, None])
    return visits(mdp, logits_SxA)[:, None] * by_state / mdp.num_prompts
  gap_YxT = token_logp(mdp, logits_SxA) - token_logp(mdp, other_SxA)
  weights = {
      "k1_loss": lambda: np.ones_like(gap_YxT),
      "k2_loss": lambda: gap_YxT,
      "k1_reward": lambda: reward_to_go(gap_YxT),
  }
  if form not in weights:
    raise ValueError(f"form={form!r} is not one of {KL_FORMS}")
  return moments(mdp, logits_SxA, score_gradients(mdp, logits_SxA, weights[form]()))[0]
