"""What the sign of a cross-fitted reward says, exactly: SFT on tables, and what falls below zero.

`methods.cleaned_sft` leaves out a demonstration y to which pi_sft, trained on others, gives less
than its early checkpoint pi_ref: r(x, y) = log pi_sft(y | x) - log pi_ref(y | x) < 0. Here SFT is
full-batch gradient descent on a table of logits, so that what is cut is a function of the
distribution of the demonstrations, of a sample of them, of the start, and of the time.
docs/cleaning_theory.md has the propositions, and names their tests.

A prompt of the table stands for all the prompts that a model treats alike. Demonstrations are
`demos_Y`, as in `objectives.py`: for each prompt the probabilities of its responses, of the
population or of a sample; prompts are uniform. Dims as in `mdp.py`, and K checkpoints. Leading
dims of demonstrations and tables stand for several runs at once.
"""

from collections.abc import Sequence

import numpy as np

from dpr_jax.theory.mdp import TokenMDP, log_softmax, per_token, sequence_logp


def right_and_wrong(
    answers: int, right: int, wrong_share: float
) -> tuple[np.ndarray, np.ndarray]:
  """Demonstrations of a prompt with W = `answers` plausible answers, R = `right` of them right.

  Returns:
    probabilities [W], (1 - wrong_share) / R for each of the first R answers, wrong_share / (W - R)
    for the others; bool [W], whether an answer is wrong. A uniform ref cuts exactly the wrong ones
    where wrong_share < 1 - R / W, and exactly the right ones where it is above.

  Raises:
    ValueError: no answer that is right, none that is wrong, or a share outside of [0, 1].
  """
  if not 0 < right < answers:
    raise ValueError(f"right={right} must be above 0 and below answers={answers}")
  if not 0 <= wrong_share <= 1:
    raise ValueError(f"wrong_share={wrong_share} must be within [0, 1]")
  wrong = np.arange(answers) >= right
  return np.where(wrong, wrong_share / (answers - right), (1 - wrong_share) / right), wrong


def token_mass(mdp: TokenMDP, demos_Y: np.ndarray) -> np.ndarray:
  """[..., S, A], the probability that a demonstration has token a in state s.

  All that SFT on a table sees of its demonstrations. Sums over A are the visits to a state, over
  everything the mean length.

  Args:
    demos_Y: [..., Y], for each prompt the probabilities of its responses.
  """
  y, lead = mdp.responses, np.shape(demos_Y)[:-1]
  mass = np.zeros((mdp.num_states + 1, mdp.vocab_size, *lead))  # state S: past the end.
  weights = np.moveaxis(np.asarray(demos_Y, np.float64), -1, 0) / mdp.num_prompts
  for t in range(mdp.max_length):
    np.add.at(mass, (y.states_YxT[:, t], y.tokens_YxT[:, t]), weights)
  return np.moveaxis(mass[:-1], (0, 1), (-2, -1))


def ascent(mass_SxA: np.ndarray, logits_SxA: np.ndarray) -> np.ndarray:
  """[..., S, A], the gradient in the logits of E_demo log pi(y | x): minus that of the SFT loss.

  In each state the visits of the demonstrations times (their next token - the policy's).
  """
  visits = np.sum(mass_SxA, axis=-1, keepdims=True)
  return mass_SxA - visits * np.exp(log_softmax(logits_SxA))


def descend(
    mass_SxA: np.ndarray,
    start_SxA: np.ndarray,
    checkpoints: Sequence[int],
    learning_rate: float,
    kernel_SxS: np.ndarray | None = None,
) -> np.ndarray:
  """Gradient descent of the SFT loss, nats per demonstration: logits [K, ..., S, A].

  With a small learning rate it is the gradient flow, at time steps x learning_rate.

  Args:
    mass_SxA: of the demonstrations, [..., S, A]; see `token_mass`.
    start_SxA: logits before the first step.
    checkpoints: steps whose logits are returned, increasing; 0 is the start.
    learning_rate: logits per step and unit of the gradient; up to 4 the loss cannot rise where
      states share nothing (its curvature is at most 1 / 2).
    kernel_SxS: how far a step in one state moves the logits of another: features F F^T of a
      log-linear policy whose logits are F_SxN W_NxA. None: each state is on its own, a table.

  Raises:
    ValueError: checkpoints that do not increase, or a learning rate that is not above 0.
  """
  if min(np.diff([-1, *checkpoints]), default=0) <= 0:
    raise ValueError(f"checkpoints={list(checkpoints)} must be steps from 0 on that increase")
  if learning_rate <= 0:
    raise ValueError(f"learning_rate={learning_rate} must be above 0")
  logits = np.broadcast_to(start_SxA, np.broadcast_shapes(mass_SxA.shape, start_SxA.shape)).copy()
  moves = np.arange(logits.shape[-2])
  if kernel_SxS is None:  # Where no demonstration passes, a table stays as it is.
    moves = np.flatnonzero(mass_SxA.sum(axis=-1).reshape(-1, len(moves)).any(axis=0))
  mass, now, kept, done = mass_SxA[..., moves, :], logits[..., moves, :], [], 0
  for step in checkpoints:
    for _ in range(step - done):
      gradient = ascent(mass, now)
      now = now + learning_rate * (gradient if kernel_SxS is None else kernel_SxS @ gradient)
    logits[..., moves, :] = now
    kept.append(logits.copy())
    done = step
  return np.stack(kept)


def log_ratio(mdp: TokenMDP, sft_SxA: np.ndarray, ref_SxA: np.ndarray) -> np.ndarray:
  """r(x, y) [..., Y] = log pi_sft(y | x) - log pi_ref(y | x), nats, of every response."""
  return sequence_logp(mdp, sft_SxA) - sequence_logp(mdp, ref_SxA)


def speed(
    mdp: TokenMDP,
    logits_SxA: np.ndarray,
    mass_SxA: np.ndarray,
    kernel_SxS: np.ndarray | None = None,
) -> np.ndarray:
  """[Y], d log pi(y | x) / dt under the gradient flow of SFT.

  The inner product of the gradient of log pi(y | x) with the mean gradient of the demonstrations
  that SFT trains on: what one more small step does to y, and so the sign of r as ref approaches
  sft. Its mean over the demonstrations trained on is the squared norm of their mean gradient.
  """
  push_SxA = ascent(mass_SxA, logits_SxA)
  if kernel_SxS is not None:
    push_SxA = kernel_SxS @ push_SxA
  # d log pi(a | s) = d logit(s, a) - E_{b ~ pi} d logit(s, b).
  mean_Sx1 = np.sum(np.exp(log_softmax(logits_SxA)) * push_SxA, axis=-1, keepdims=True)
  return np.sum(per_token(mdp, push_SxA - mean_Sx1), axis=-1)


def cut_shares(
    mdp: TokenMDP, demos_Y: np.ndarray, wrong_Y: np.ndarray, rewards_Y: np.ndarray
) -> dict[str, np.ndarray]:
  """What a cut below zero leaves out of demonstrations that are distributed like `demos_Y`.

  Args:
    demos_Y: the demonstrations that are judged.
    wrong_Y: bool, whether a response is a wrong answer to its prompt.
    rewards_Y: [..., Y], their cross-fitted rewards.

  Returns:
    `cut`, of all; `wrong_cut`, wrong ones among the cut (NaN where nothing is cut); `wrong_kept`,
    wrong ones among the kept (the same); `right_lost` and `wrong_found`, the share of the right and
    of the wrong ones that is cut. Each [...]. With e the share of wrong demonstrations,
    cut = e wrong_found + (1 - e) right_lost.
  """
  p_Y, below = demos_Y / mdp.num_prompts, rewards_Y < 0
  wrong, cut = np.sum(p_Y * wrong_Y), np.sum(p_Y * below, axis=-1)
  wrong_below = np.sum(p_Y * (below & wrong_Y), axis=-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    return {
        "cut": cut,
        "wrong_cut": wrong_below / cut,
        "wrong_kept": (wrong - wrong_below) / (1 - cut),
        "right_lost": (cut - wrong_below) / (1 - wrong),
        "wrong_found": wrong_below / wrong,
    }
