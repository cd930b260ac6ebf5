"""What Dense-Path REINFORCE converges to, exactly, by recursion and in closed form.

    max_pi E[sum_t r(t)] - beta_sft KL(pi || pi_sft) - beta_ref KL(pi || pi_ref)

With r = log pi_sft - log pi_ref the optimum is, over whole responses,

    pi* proportional to pi_sft^((1 + beta_sft) / b) pi_ref^((beta_ref - 1) / b)
    with b = beta_sft + beta_ref

which at beta_ref = 0 is pi_sft^(1 + 1 / beta) pi_ref^(-1 / beta): extrapolation away from pi_ref
at sequence level. Dims as in `mdp.py`.
"""

import numpy as np

from dpr_jax.theory.mdp import TokenMDP, by_prompt, log_softmax, logsumexp, sequence_logp
from dpr_jax.theory.values import expected_return, sequence_kl


def _strength(beta_sft: float, beta_ref: float) -> float:
  if beta_sft < 0 or beta_ref < 0 or beta_sft + beta_ref <= 0:
    raise ValueError(f"beta_sft={beta_sft} and beta_ref={beta_ref} must be >= 0, one of them > 0")
  return beta_sft + beta_ref


def regularised_return(
    mdp: TokenMDP,
    logits_SxA: np.ndarray,
    reward_SxA: np.ndarray,
    sft_SxA: np.ndarray,
    beta_sft: float,
    ref_SxA: np.ndarray | None = None,
    beta_ref: float = 0.0,
) -> np.ndarray:
  """[P], the objective above for a policy, nats."""
  out = expected_return(mdp, logits_SxA, reward_SxA)
  out = out - beta_sft * sequence_kl(mdp, logits_SxA, sft_SxA)
  if ref_SxA is not None:
    out = out - beta_ref * sequence_kl(mdp, logits_SxA, ref_SxA)
  return out


def soft_optimum(
    mdp: TokenMDP,
    reward_SxA: np.ndarray,
    sft_SxA: np.ndarray,
    beta_sft: float,
    ref_SxA: np.ndarray | None = None,
    beta_ref: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
  """(log pi* [S, A], V* [S]) of any token reward, by the soft Bellman recursion.

    V(s) = b logsumexp_a [ (r(s, a) + V(s') + beta_sft log pi_sft + beta_ref log pi_ref) / b ]

  Raises:
    ValueError: negative weights, none above 0, or beta_ref without a ref.
  """
  b = _strength(beta_sft, beta_ref)
  if beta_ref and ref_SxA is None:
    raise ValueError(f"beta_ref={beta_ref} needs ref_SxA")
  prior_SxA = beta_sft * log_softmax(sft_SxA)
  if ref_SxA is not None:
    prior_SxA = prior_SxA + beta_ref * log_softmax(ref_SxA)
  value = np.zeros(mdp.num_states + 1)
  log_pi_SxA = np.zeros_like(prior_SxA)
  for depth in reversed(range(mdp.max_length)):
    s = np.flatnonzero(mdp.depth_S == depth)
    scores = (reward_SxA[s] + value[mdp.next_SxA[s]] + prior_SxA[s]) / b
    value[s] = b * logsumexp(scores)
    log_pi_SxA[s] = log_softmax(scores)
  return log_pi_SxA, value[:-1]


def closed_form(
    mdp: TokenMDP,
    sft_SxA: np.ndarray,
    ref_SxA: np.ndarray,
    beta_sft: float,
    beta_ref: float = 0.0,
) -> np.ndarray:
  """[Y], log pi*(y | x) of the baseline-relative reward, from sequence log-probs alone."""
  b = _strength(beta_sft, beta_ref)
  log_w_Y = (
      (1 + beta_sft) * sequence_logp(mdp, sft_SxA) + (beta_ref - 1) * sequence_logp(mdp, ref_SxA)
  ) / b
  top_P = np.full(mdp.num_prompts, -np.inf)
  np.maximum.at(top_P, mdp.responses.prompts_Y, log_w_Y)
  log_w_Y = log_w_Y - top_P[mdp.responses.prompts_Y]
  return log_w_Y - np.log(by_prompt(mdp, np.exp(log_w_Y)))[mdp.responses.prompts_Y]


def as_policy(mdp: TokenMDP, logp_Y: np.ndarray) -> np.ndarray:
  """[S, A], the token log-probs whose responses have the given (positive) probabilities."""
  y = mdp.responses
  mass_SxA = np.zeros((mdp.num_states + 1, mdp.vocab_size))
  for t in range(mdp.max_length):
    np.add.at(mass_SxA, (y.states_YxT[:, t], y.tokens_YxT[:, t]), np.exp(logp_Y))
  return log_softmax(np.log(mass_SxA[:-1]))


def contrastive(sft_SxA: np.ndarray, ref_SxA: np.ndarray, beta: float) -> np.ndarray:
  """[S, A], log softmax((1 + 1 / beta) Q_sft - (1 / beta) Q_ref): the optimum at gamma = 0.

  Each state maximises its own E[r] - beta KL; what follows a token does not count. It takes
  no training: contrastive decoding at strength 1 / beta.
  """
  return log_softmax((1 + 1 / beta) * log_softmax(sft_SxA) - log_softmax(ref_SxA) / beta)


def reward_error_bounds(mdp: TokenMDP, epsilon: float, beta: float = 0.0) -> dict[str, float]:
  """How far a reward that is wrong by at most `epsilon` nats per token can lead, with constants.

  Let |r'(s, a) - r(s, a)| <= epsilon everywhere, T = max_length, pi* and pi' the optima of r and
  r' at the same KL weight `beta`, J the regularised return under r.

    evaluation     |E_pi sum r' - E_pi sum r|       <= T epsilon, for every policy
                   (exactly: <= epsilon times its expected length; the simulation lemma)
    soft_value     |V'*(s) - V*(s)|                 <= (T - depth(s)) epsilon: the soft Bellman
                   operator does not expand the max-norm, and errors add over what is left
    suboptimality  0 <= J(pi*) - J(pi')             <= min(2 T epsilon, (T epsilon)^2 / (2 beta))
    log_ratio      |log pi'(y | x) - log pi*(y | x)| <= 2 T epsilon / beta, for every response

  The first term of the suboptimality adds the evaluation error of both policies. The second
  holds because J(pi*) - J(pi') = beta KL(pi' || pi*) exactly, and pi' is pi* reweighted by the
  exponential of a variable within +-T epsilon / beta (Hoeffding's lemma): a strong KL squares
  a small error.
  """
  worst = mdp.max_length * epsilon
  return {
      "evaluation": worst,
      "soft_value": worst,
      "suboptimality": min(2 * worst, worst**2 / (2 * beta)) if beta else 2 * worst,
      "log_ratio": 2 * worst / beta if beta else np.inf,
  }
