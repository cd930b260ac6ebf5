"""Exact values, visits and divergences of tabular policies. Numpy float64; dims as in `mdp.py`."""

import numpy as np

from dpr_jax.theory.mdp import TokenMDP, by_prompt, log_softmax, sequence_logp


def policy_values(
    mdp: TokenMDP, logits_SxA: np.ndarray, reward_SxA: np.ndarray, gamma: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
  """(V [S], Q [S, A]) of a token reward under a policy, by backward induction.

  Q(s, a) = r(s, a) + gamma V(s'), V(s) = E_{a ~ pi} Q(s, a), V(end) = 0.
  """
  pi_SxA = np.exp(log_softmax(logits_SxA))
  value = np.zeros(mdp.num_states + 1)
  q_SxA = np.zeros_like(pi_SxA)
  for depth in reversed(range(mdp.max_length)):
    s = np.flatnonzero(mdp.depth_S == depth)
    q_SxA[s] = reward_SxA[s] + gamma * value[mdp.next_SxA[s]]
    value[s] = np.sum(pi_SxA[s] * q_SxA[s], axis=1)
  return value[:-1], q_SxA


def expected_return(mdp: TokenMDP, logits_SxA: np.ndarray, reward_SxA: np.ndarray) -> np.ndarray:
  """[P], E_{y ~ pi(. | x)} sum_t r(s_t, y_t)."""
  return policy_values(mdp, logits_SxA, reward_SxA)[0][: mdp.num_prompts]


def visits(mdp: TokenMDP, logits_SxA: np.ndarray) -> np.ndarray:
  """[S], the probability that a response to the state's own prompt passes through it."""
  pi_SxA = np.exp(log_softmax(logits_SxA))
  d = np.zeros(mdp.num_states + 1)
  d[: mdp.num_prompts] = 1.0
  for depth in range(mdp.max_length):
    s = np.flatnonzero(mdp.depth_S == depth)
    np.add.at(d, mdp.next_SxA[s], d[s, None] * pi_SxA[s])
  return d[:-1]


def expected_length(mdp: TokenMDP, logits_SxA: np.ndarray) -> np.ndarray:
  """[P], expected number of tokens, EOS included."""
  return by_prompt(mdp, visits(mdp, logits_SxA))


def state_kl(logits_SxA: np.ndarray, other_SxA: np.ndarray) -> np.ndarray:
  """[S], KL(pi(. | s) || other(. | s)), nats."""
  log_p, log_q = log_softmax(logits_SxA), log_softmax(other_SxA)
  return np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


def sequence_kl(mdp: TokenMDP, logits_SxA: np.ndarray, other_SxA: np.ndarray) -> np.ndarray:
  """[P], KL of whole responses, nats: the KL of each state times the policy's visits to it."""
  return by_prompt(mdp, visits(mdp, logits_SxA) * state_kl(logits_SxA, other_SxA))


def total_variation(mdp: TokenMDP, logits_SxA: np.ndarray, other_SxA: np.ndarray) -> np.ndarray:
  """[P], half the L1 distance between the two distributions over whole responses."""
  p, q = (np.exp(sequence_logp(mdp, x)) for x in (logits_SxA, other_SxA))
  return 0.5 * by_prompt(mdp, np.abs(p - q))
