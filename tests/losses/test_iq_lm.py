"""IQ-LM against loops, the end of a response, and the gauge that it pins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.data.batches import SFTBatch
from dpr_jax.errors import UserError
from dpr_jax.losses import make_sft_loss
from dpr_jax.methods.iq_lm import IQLM, next_values


def _rewards(logits_of, variables, rows):
  """Q(s, a) - V(s') of every trained token, V = 0 after the last of a run of them."""
  out = []
  for b, t in zip(*np.nonzero(rows.loss_mask)):
    logits = logits_of(variables, rows.tokens[b])
    v = lambda column: np.log(np.sum(np.exp(logits[column - 1])))  # noqa: B023
    q = logits[t - 1][rows.tokens[b, t]]
    last = t + 1 == rows.tokens.shape[1] or not rows.loss_mask[b, t + 1]
    out.append(q - (0.0 if last else v(t + 1)))
  return np.array(out)


@pytest.mark.parametrize("lam", [0.1, 1.0, 30.0])
def test_loss_equals_a_loop(bigram, make_rows, naive, rng, lam):
  model, variables = bigram
  rows, (logits_of, logp_of) = make_rows(left=bool(rng.integers(2))), naive
  loss_sum, weight, metrics = IQLM(lam=lam).loss(model)(variables, rows, None)
  nll = -sum(logp_of(variables, rows.tokens[b], t) for b, t in zip(*np.nonzero(rows.loss_mask)))
  rewards = _rewards(logits_of, variables, rows)
  expected = nll + np.sum(np.square(rewards)) / (4 * lam)
  assert float(weight) == len(rewards) == float(metrics["tokens"])
  assert float(loss_sum) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["nll"][0]) == pytest.approx(nll, rel=1e-5)
  assert float(metrics["endogenous_reward"][0]) == pytest.approx(rewards.sum(), abs=1e-3)
  assert float(metrics["endogenous_reward_sq"][0]) == pytest.approx(np.sum(rewards**2), rel=1e-4)


def test_a_large_lambda_is_sft(bigram, make_rows):
  model, variables = bigram
  rows = make_rows()
  got = IQLM(lam=1e9).loss(model)(variables, rows, None)
  expected = make_sft_loss(model)(variables, rows, None)
  assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-5)
  assert float(got[1]) == float(expected[1])


def test_the_gradient_flows_through_both_values(bigram, make_rows, check_gradient):
  model, variables = bigram
  rows = make_rows()
  loss = lambda v: IQLM(lam=0.5).loss(model)(v, rows, None)[0]
  check_gradient(loss, loss, variables)


def test_the_gauge_is_pinned(bigram, make_rows):
  """A constant added to all logits does nothing to SFT, and much to IQ-LM."""
  model, variables = bigram
  rows = make_rows()

  class Shifted:
    cfg = model.cfg

    def __init__(self, shift):
      self.shift = shift

    def apply(self, *args, method=None, **kwargs):
      out = model.apply(*args, method=method, **kwargs)
      return out + self.shift if method == "unembed" else out

  sft, iq = (
      [float(make(Shifted(c))(variables, rows, None)[0]) for c in (0.0, 3.0)]
      for make in (make_sft_loss, IQLM().loss)
  )
  assert sft[0] == pytest.approx(sft[1], rel=1e-5)
  assert abs(iq[0] - iq[1]) > 0.1


def test_the_value_after_a_response_is_zero():
  """At the end of a row, of a turn, of a packed demonstration; not between trained tokens."""
  mask = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 0]], np.float32)
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
  values = np.arange(10.0, 19.0, dtype=np.float32)[None]
  got = next_values(jnp.asarray(values), jnp.asarray(mask), jnp.asarray(segments))
  # Where the mask is 0 (columns 0, 3, 8) the result is not used.
  np.testing.assert_array_equal(
      np.asarray(got)[mask > 0], np.array([12, 0, 0, 16, 17, 0], np.float32)
  )


def test_packing_and_padding_do_not_matter(bigram, make_rows, pack_rows, rng):
  model, variables = bigram
  rows = make_rows()
  loss = jax.jit(jax.value_and_grad(lambda v, b: IQLM().loss(model)(v, b, None)[0]))
  noise = np.where(rows.segment_ids > 0, rows.tokens, rng.integers(0, 7, rows.tokens.shape))
  expected = loss(variables, rows)
  for other in (rows.replace(tokens=noise.astype(np.int32)), pack_rows(rows)):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        loss(variables, other), expected,
    )


def test_untrained_tokens_of_later_turns_do_not_leak(bigram, naive):
  """prompt, response, user turn, response: the user's tokens are states, never rewards."""
  model, variables = bigram
  rows = SFTBatch(
      tokens=np.array([[1, 2, 3, 4, 5, 6, 0, 1]], np.int32),
      segment_ids=np.array([[1, 1, 1, 1, 1, 1, 1, 0]], np.int32),
      loss_mask=np.array([[0, 1, 1, 0, 0, 1, 1, 0]], np.float32),
  )
  _, weight, metrics = IQLM().loss(model)(variables, rows, None)
  rewards = _rewards(naive[0], variables, rows)
  assert float(weight) == 4
  assert float(metrics["endogenous_reward_sq"][0]) == pytest.approx(np.sum(rewards**2), rel=1e-4)


def test_micro_batches_add_up(bigram, make_rows, check_accumulation):
  model, variables = bigram
  check_accumulation(IQLM(lam=2.0).loss(model), variables, make_rows())


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan")])
def test_an_impossible_lambda_is_refused(lam):
  config = default_config()
  config.methods.iq_lm = IQLM(lam=lam)
  with pytest.raises(UserError, match=f"config.methods.iq_lm.lam={lam}"):
    resolve(config)
