"""Rewards and imitation objectives on tables: SFT as inverse soft-Q learning, exactly.

With logits as Q and V(s) = logsumexp_a Q(s, a), pi_Q = softmax(Q). IQ-Learn (arXiv 2106.12142)
with a linear conjugate is, un-normalised at gamma = 1,

    J(Q) = E_demo[ sum_t Q(s_t, a_t) - V(s_{t+1}) ] - E[ V(s_0) ]

and telescopes to the log-likelihood of the demonstrations (arXiv 2510.02493).
Expectations are over prompts, uniform, and the demonstrations `demos_Y`: for each prompt the
probabilities of its responses [Y], which sum to 1. Dims as in `mdp.py`.
"""

import numpy as np

from dpr_jax.theory.mdp import TokenMDP, log_softmax, logsumexp, per_token, sequence_logp


def next_value(mdp: TokenMDP, value_S: np.ndarray) -> np.ndarray:
  """[S, A], the value of the state after each token; V(end) = 0."""
  return np.append(value_S, 0.0)[mdp.next_SxA]


def baseline_relative(sft_SxA: np.ndarray, ref_SxA: np.ndarray) -> np.ndarray:
  """r(s, a) = log pi_sft(a | s) - log pi_ref(a | s), [S, A]."""
  return log_softmax(sft_SxA) - log_softmax(ref_SxA)


def endogenous(mdp: TokenMDP, q_SxA: np.ndarray) -> np.ndarray:
  """r(s, a) = Q(s, a) - V(s'), [S, A]: the inverse soft Bellman operator at gamma = 1."""
  return q_SxA - next_value(mdp, logsumexp(q_SxA))


def shape(mdp: TokenMDP, reward_SxA: np.ndarray, potential_S: np.ndarray) -> np.ndarray:
  """r(s, a) + phi(s') - phi(s), phi(end) = 0: potential shaping (Ng, Harada, Russell 1999)."""
  return reward_SxA + next_value(mdp, potential_S) - potential_S[:, None]


def _expect(mdp: TokenMDP, demos_Y: np.ndarray, values_Y: np.ndarray) -> float:
  return float(np.sum(demos_Y * values_Y) / mdp.num_prompts)


def sft_loss(mdp: TokenMDP, logits_SxA: np.ndarray, demos_Y: np.ndarray) -> float:
  """Negative log-likelihood of a demonstration, nats summed over its tokens."""
  return -_expect(mdp, demos_Y, sequence_logp(mdp, logits_SxA))


def iq_learn(mdp: TokenMDP, q_SxA: np.ndarray, demos_Y: np.ndarray) -> float:
  """J(Q) as in the module's docstring, to be maximised."""
  rewards_Y = np.sum(per_token(mdp, endogenous(mdp, q_SxA)), axis=1)
  return _expect(mdp, demos_Y, rewards_Y) - float(np.mean(logsumexp(q_SxA)[: mdp.num_prompts]))


def iq_learn_normalised(
    mdp: TokenMDP, q_SxA: np.ndarray, demos_Y: np.ndarray, gamma: float
) -> float:
  """The form of most code, E_demo sum_t gamma^t [Q - gamma V(s')] - (1 - gamma) E V(s_0).

  A trap at gamma = 1: the last term vanishes, the identity with SFT breaks, and adding a
  constant to every logit of s_0 raises the objective without end. Kept to show it.
  """
  value_S = logsumexp(q_SxA)
  terms_YxT = per_token(mdp, q_SxA - gamma * next_value(mdp, value_S))
  discounted_Y = np.sum(terms_YxT * gamma ** np.arange(mdp.max_length), axis=1)
  start = float(np.mean(value_S[: mdp.num_prompts]))
  return _expect(mdp, demos_Y, discounted_Y) - (1.0 - gamma) * start
