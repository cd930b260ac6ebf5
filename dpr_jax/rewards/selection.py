"""How good a reference is, measured on training prompts; and the choice among several.

  validation  the area under the curve of corrupted tokens: one token of each demonstration is
              replaced by one from elsewhere; how often is the reward of a replaced token below
              that of a token which was demonstrated?
  snr         signal to noise, mean r / std r over the tokens of responses sampled from sft. The
              mean is KL(sft || ref) a token; an early reference usually has the larger ratio.

Both are computed on demonstrations that sft was trained on, never on prompts that are reported;
they flatter sft, and all candidates alike. Pure functions of numpy arrays.
"""

from collections.abc import Mapping, Sequence

import numpy as np

CRITERIA = {"validation": "auc", "snr": "snr"}


def corrupt(
    responses: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
  """Copies of responses with one token replaced, and where; the last token (EOS) is never touched.

  Args:
    responses: int32 [T_i], ending with EOS. The replacement is drawn from the tokens of all
      responses that come before an EOS, so that it is of their kind.

  Returns:
    (copies, int64 [n] positions; -1 where nothing could be replaced).
  """
  pool = np.concatenate([r[:-1] for r in responses]) if len(responses) else np.zeros(0, np.int32)
  copies, places = [], []
  for response in responses:
    copy, place = np.array(response), -1
    if len(copy) > 1:
      at = int(rng.integers(len(copy) - 1))
      others = pool[pool != copy[at]]
      if len(others):
        copy[at], place = rng.choice(others), at
    copies.append(copy)
    places.append(place)
  return copies, np.asarray(places, np.int64)


def auc(good: np.ndarray, bad: np.ndarray) -> float:
  """P(a random good > a random bad) + P(equal) / 2 (Mann-Whitney); nan if one is empty."""
  good, bad = np.asarray(good, np.float64), np.sort(np.asarray(bad, np.float64))
  if not len(good) or not len(bad):
    return float("nan")
  below = np.searchsorted(bad, good, side="left")
  not_above = np.searchsorted(bad, good, side="right")
  return float((below + not_above).mean() / (2 * len(bad)))


def reward_statistics(rewards: Sequence[np.ndarray]) -> dict[str, float]:
  """Of token rewards [T_i] of responses sampled from sft.

  Returns:
    kl: KL(sft || ref), the mean summed reward, nats a response; kl_se: its standard error;
    reward_mean, reward_std: nats, over tokens; snr: their ratio (0 where the rewards are constant).
  """
  totals = np.asarray([r.astype(np.float64).sum() for r in rewards])
  tokens = np.concatenate(rewards).astype(np.float64)
  mean, std = float(tokens.mean()), float(tokens.std())
  error = float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else float("nan")
  return {
      "kl": float(totals.mean()),
      "kl_se": error,
      "reward_mean": mean,
      "reward_std": std,
      "snr": mean / std if std > 0 else 0.0,
  }


def choose(candidates: Sequence[Mapping[str, float]], select: str) -> int:
  """Index of the candidate with the largest value of a criterion; the earliest of equals.

  Raises:
    ValueError: no candidate has a finite value.
  """
  values = np.asarray([c[CRITERIA[select]] for c in candidates], np.float64)
  if not np.isfinite(values).any():
    raise ValueError(f"no candidate has a finite {CRITERIA[select]}")
  return int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
