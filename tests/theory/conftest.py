"""Random tabular instances."""

import dataclasses

import numpy as np
import pytest

from dpr_jax.theory import TokenMDP
from dpr_jax.theory.mdp import by_prompt


@dataclasses.dataclass(frozen=True)
class Instance:
  """A language with a policy, an SFT model and a reference, as tables of logits."""

  mdp: TokenMDP
  policy: np.ndarray
  sft: np.ndarray
  ref: np.ndarray


@pytest.fixture
def make_instance(rng):
  """make_instance(num_prompts=2, vocab_size=3, max_length=3) -> a fresh random Instance.

  ref is a flatter, perturbed sft, as an earlier checkpoint would be.
  """

  def make(num_prompts=2, vocab_size=3, max_length=3):
    mdp = TokenMDP(num_prompts, vocab_size, max_length, eos=int(rng.integers(vocab_size)))
    sft = mdp.random_logits(rng)
    ref = 0.5 * sft + mdp.random_logits(rng, 0.3)
    return Instance(mdp, policy=mdp.random_logits(rng), sft=sft, ref=ref)

  return make


@pytest.fixture
def random_demos(rng):
  """random_demos(mdp) -> a fresh random distribution over each prompt's responses, [Y]."""

  def make(mdp):
    demos_Y = rng.exponential(size=len(mdp.responses.lengths_Y))
    return demos_Y / by_prompt(mdp, demos_Y)[mdp.responses.prompts_Y]

  return make
