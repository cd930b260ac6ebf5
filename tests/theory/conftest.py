"""Random tabular instances."""

import dataclasses

import numpy as np
import pytest

from dpr_jax.theory import TokenMDP


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
