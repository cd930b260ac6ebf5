"""Scores of the tokens of one response, and what they amount to for the whole."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Scores of one response of T tokens, EOS included. float32 [T] each, nats."""

  logp_sft: np.ndarray
  logp_ref: np.ndarray
  logsumexp_sft: np.ndarray | None = None  # V(s_t) of the state in which token t is chosen.

  @property
  def token_rewards(self) -> np.ndarray:
    """log pi_sft - log pi_ref; they sum to the log-ratio of the response."""
    return self.logp_sft - self.logp_ref

  @property
  def endogenous(self) -> np.ndarray:
    """log pi_sft + V(s_t) - V(s_{t+1}), as `rewards.endogenous` defines it."""
    return self.logp_sft + self.logsumexp_sft - np.append(self.logsumexp_sft[1:], np.float32(0))

  def of_response(self, mask: np.ndarray | None = None) -> dict[str, float]:
    """NAME_REDUCE -> score of the response, for each of `NAMES` and `REDUCE`.

    Args:
      mask: bool [T], the tokens that count; None: all.
    """
    out = {}
    for name, field in NAMES.items():
      values_T = getattr(self, field).astype(np.float64)
      values_T = values_T if mask is None else values_T[mask]
      out |= {f"{name}_{how}": float(reduce(values_T)) for how, reduce in REDUCE.items()}
    return out


# What is scored -> the field of `TokenScores`, and of a line that `dpr_jax.score` writes.
NAMES = {"reward": "token_rewards", "logp_sft": "logp_sft", "endogenous": "endogenous"}
LABELS = {"reward": "log pi_sft - log pi_ref", "logp_sft": "log pi_sft",
          "endogenous": "endogenous reward"}
REDUCE = {"sum": np.sum, "mean": np.mean, "min": np.min}  # over tokens.
