"""The enumeration is complete, and its log-probs are those of a naive loop."""

import itertools
import math

import numpy as np
import pytest

from dpr_jax.errors import UserError
from dpr_jax.theory import TokenMDP
from dpr_jax.theory.mdp import by_prompt, log_softmax, logsumexp, per_token, sequence_logp


def _naive_responses(mdp):
  """Every token string that ends with its first EOS, or is cut at max_length without one."""
  for length in range(1, mdp.max_length + 1):
    for y in itertools.product(range(mdp.vocab_size), repeat=length):
      ends = y[-1] == mdp.eos or length == mdp.max_length
      if ends and mdp.eos not in y[:-1]:
        yield y


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 3, 3), (1, 4, 3), (3, 2, 4)])
def test_the_responses_are_those_of_a_naive_enumeration(make_instance, sizes):
  mdp = make_instance(*sizes).mdp
  r = mdp.responses
  got = [
      (int(p), tuple(int(a) for a in y[:n]))
      for p, y, n in zip(r.prompts_Y, r.tokens_YxT, r.lengths_Y)
  ]
  expected = [(p, y) for p in range(mdp.num_prompts) for y in _naive_responses(mdp)]
  assert sorted(got) == sorted(expected) and len(set(got)) == len(got)
  for (p, y), states, mask, hit in zip(got, r.states_YxT, r.mask_YxT, r.hit_eos_Y):
    assert [mdp.states[s] for s in states[: len(y)]] == [(p, y[:t]) for t in range(len(y))]
    assert set(states[len(y) :]) <= {mdp.num_states}
    assert mask.tolist() == [1.0] * len(y) + [0.0] * (mdp.max_length - len(y))
    assert hit == (y[-1] == mdp.eos)


def test_sequence_logp_is_a_sum_over_states_and_a_distribution(make_instance):
  i = make_instance(2, 3, 4)
  logp_Y = sequence_logp(i.mdp, i.sft)
  r = i.mdp.responses
  for row in range(len(logp_Y)):
    total = 0.0
    for t in range(r.lengths_Y[row]):
      s = i.mdp.index[int(r.prompts_Y[row]), tuple(int(a) for a in r.tokens_YxT[row, :t])]
      weights = [math.exp(x) for x in i.sft[s]]
      total += math.log(weights[r.tokens_YxT[row, t]] / sum(weights))
    assert logp_Y[row] == pytest.approx(total, abs=1e-12)
  np.testing.assert_allclose(by_prompt(i.mdp, np.exp(logp_Y)), 1.0, atol=1e-12)


def test_log_softmax_survives_large_logits():
  x = np.array([[1e4, 0.0, -1e4]])
  np.testing.assert_allclose(log_softmax(x), [[0.0, -1e4, -2e4]])
  np.testing.assert_allclose(logsumexp(x), [1e4])


def test_by_prompt_sums_states_and_responses(make_instance):
  mdp = make_instance(3, 3, 2).mdp
  np.testing.assert_array_equal(by_prompt(mdp, np.ones(mdp.num_states)), 3.0)  # 1 + 2 prefixes.
  np.testing.assert_array_equal(by_prompt(mdp, np.ones(len(mdp.responses.lengths_Y))), 7.0)
  np.testing.assert_array_equal(
      per_token(mdp, np.ones((mdp.num_states, 3))), mdp.responses.mask_YxT
  )


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_prompts=0), "num_prompts=0"),
        (dict(vocab_size=1), "vocab_size=1"),
        (dict(max_length=0), "max_length=0"),
        (dict(eos=3), "eos=3"),
        (dict(vocab_size=50, max_length=20), "max_length=20"),
    ],
)
def test_impossible_sizes_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    TokenMDP(**fields)
