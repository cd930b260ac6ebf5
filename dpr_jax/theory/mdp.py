"""The token MDP of a small language, enumerated: states are prefixes, and nothing is sampled.

A state is a prompt and the tokens written so far; an action appends a token; the episode
ends after EOS, or with token `max_length`. Everything is numpy float64, so that identities
hold to rounding and a violation is a mistake, not noise.

Dims: P prompts, S states (unfinished prefixes, of all prompts), A vocabulary (actions),
Y complete responses (of all prompts), T tokens of the longest response. A policy is a table of
logits [S, A]; a reward is a table [S, A] in nats. State S, one past the table, is the end.
"""

import dataclasses
import functools

import numpy as np

from dpr_jax.errors import UserError

MAX_RESPONSES = 200_000  # what fits the memory of a laptop several times over.


@dataclasses.dataclass(frozen=True)
class Responses:
  """Every complete response to every prompt, one per row."""

  prompts_Y: np.ndarray  # int, the prompt it answers.
  tokens_YxT: np.ndarray  # int, 0 past the end.
  states_YxT: np.ndarray  # int, the state in which token t is chosen; S past the end.
  mask_YxT: np.ndarray  # float64, 1 on the tokens of the response, EOS included.
  lengths_Y: np.ndarray  # int, tokens, EOS included.
  hit_eos_Y: np.ndarray  # bool; False: cut at T tokens.


@dataclasses.dataclass(frozen=True)
class TokenMDP:
  """A language of `vocab_size` tokens and responses of at most `max_length` of them.

  Raises:
    UserError: a size below 1 (2 for the vocabulary), an EOS outside of the vocabulary, or
      more than MAX_RESPONSES responses.
  """

  num_prompts: int = 1
  vocab_size: int = 3
  max_length: int = 3
  eos: int = 0

  def __post_init__(self):
    for name, least in (("num_prompts", 1), ("vocab_size", 2), ("max_length", 1)):
      if getattr(self, name) < least:
        raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
    if not 0 <= self.eos < self.vocab_size:
      raise UserError(f"eos={self.eos} is not a token of a vocabulary of {self.vocab_size}")
    count = self.num_prompts
    for _ in range(self.max_length):
      count *= self.vocab_size - 1
      if count > MAX_RESPONSES:
        raise UserError(f"more than {MAX_RESPONSES} responses: lower "
                        f"num_prompts={self.num_prompts}, vocab_size={self.vocab_size} or "
                        f"max_length={self.max_length}")

  @functools.cached_property
  def states(self) -> list[tuple[int, tuple[int, ...]]]:
    """(prompt, prefix) of each state; shorter prefixes first, so that states 0 .. P - 1 are s_0."""
    go_on = [a for a in range(self.vocab_size) if a != self.eos]
    levels = [[(p, ()) for p in range(self.num_prompts)]]
    for _ in range(1, self.max_length):
      levels.append([(p, (*prefix, a)) for p, prefix in levels[-1] for a in go_on])
    return [state for level in levels for state in level]

  @property
  def num_states(self) -> int:
    return len(self.states)

  @functools.cached_property
  def index(self) -> dict[tuple[int, tuple[int, ...]], int]:
    """(prompt, prefix) -> its row in a table."""
    return {state: s for s, state in enumerate(self.states)}

  @functools.cached_property
  def prompt_S(self) -> np.ndarray:
    """int [S], the prompt of each state."""
    return np.array([p for p, _ in self.states])

  @functools.cached_property
  def depth_S(self) -> np.ndarray:
    """int [S], tokens written so far."""
    return np.array([len(prefix) for _, prefix in self.states])

  @functools.cached_property
  def next_SxA(self) -> np.ndarray:
    """int [S, A], the state after each token; S where the response is complete."""
    end = self.num_states
    return np.array([
        [self.index.get((p, (*prefix, a)), end) if a != self.eos else end
         for a in range(self.vocab_size)]
        for p, prefix in self.states
    ])

  @functools.cached_property
  def responses(self) -> Responses:
    """All complete responses."""
    rows = []
    for (p, prefix), following in zip(self.states, self.next_SxA):
      path = [self.index[p, prefix[:t]] for t in range(len(prefix) + 1)]
      for a in np.flatnonzero(following == self.num_states):
        rows.append((p, (*prefix, int(a)), path))
    rows.sort(key=lambda row: row[:2])
    width = self.max_length
    pad = lambda x, fill: [*x, *[fill] * (width - len(x))]
    lengths_Y = np.array([len(y) for _, y, _ in rows])
    return Responses(
        prompts_Y=np.array([p for p, _, _ in rows]),
        tokens_YxT=np.array([pad(y, 0) for _, y, _ in rows]),
        states_YxT=np.array([pad(path, self.num_states) for *_, path in rows]),
        mask_YxT=(np.arange(width) < lengths_Y[:, None]).astype(np.float64),
        lengths_Y=lengths_Y,
        hit_eos_Y=np.array([y[-1] == self.eos for _, y, _ in rows]),
    )

  def random_logits(self, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """float64 [S, A], independent normal logits of standard deviation `scale`, nats."""
    return scale * rng.normal(size=(self.num_states, self.vocab_size))


def logsumexp(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  top = np.max(x, axis=-1, keepdims=True)
  return np.log(np.sum(np.exp(x - top), axis=-1)) + top[..., 0]


def log_softmax(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  return x - logsumexp(x)[..., None]


def per_token(mdp: TokenMDP, table_SxA: np.ndarray) -> np.ndarray:
  """[Y, T], the entry of a table at each token of each response; 0 past the end.

  Dims before [S, A] stand for several tables, here and below: [..., S, A] gives [..., Y, T].
  """
  y = mdp.responses
  on = y.mask_YxT > 0
  states = np.where(on, y.states_YxT, 0)
  return np.where(on, table_SxA[..., states, y.tokens_YxT], 0.0)


def token_logp(mdp: TokenMDP, logits_SxA: np.ndarray) -> np.ndarray:
  """[Y, T], log pi(y_t | s_t), nats; 0 past the end."""
  return per_token(mdp, log_softmax(logits_SxA))


def sequence_logp(mdp: TokenMDP, logits_SxA: np.ndarray) -> np.ndarray:
  """[Y], log pi(y | x), nats; the probabilities of the responses to a prompt sum to 1."""
  return np.sum(token_logp(mdp, logits_SxA), axis=-1)


def by_prompt(mdp: TokenMDP, values: np.ndarray) -> np.ndarray:
  """[P], values of states [S] or of responses [Y] summed over each prompt's own."""
  # Every state ends with EOS at least once, and the longest also without: Y > S.
  owner = mdp.prompt_S if len(values) == mdp.num_states else mdp.responses.prompts_Y
  return np.bincount(owner, weights=values, minlength=mdp.num_prompts)
