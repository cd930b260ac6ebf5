"""Sampled responses against loops of full forwards and exact probabilities."""

import jax
import numpy as np
import pytest

from dpr_jax.data.batches import PromptBatch
from dpr_jax.keys import row_keys
from dpr_jax.models import token_logprobs
from dpr_jax.rollout import Sampling, generate
from dpr_jax.rollout.sampler import right_align

N, P = 7, 5
LENGTHS = (5, 2, 0, 3, 1, 4)

sample = jax.jit(
    generate, static_argnums=0,
    static_argnames=("max_new_tokens", "stop_ids", "sampling", "weights", "samples_per_prompt",
                     "slots", "refill", "with_entropy"),
)


def _prompts(rng, vocab=29, lengths=LENGTHS):
  tokens = rng.integers(0, vocab, (len(lengths), P)).astype(np.int32)
  lengths = np.asarray(lengths, np.int32)
  return PromptBatch(tokens=np.where(np.arange(P) < lengths[:, None], tokens, 0), lengths=lengths)


@jax.jit
def _log_softmax(logits):
  return jax.nn.log_softmax(logits, axis=-1)


class Naive:
  """Next-token logits by a full forward over the row, without cache or padding on its left."""

  def __init__(self, model):
    self._run = jax.jit(
        lambda v, row: model.apply(v, model.apply(v, row)[0], method="unembed")[0]
    )

  def __call__(self, variables, row):
    padded = np.resize(np.asarray(row, np.int32), (1, N + P))  # causal: what follows is not seen.
    return np.asarray(self._run(variables, padded))[len(row) - 1]


def test_right_align_moves_every_prompt_to_the_last_column(rng):
  prompts = _prompts(rng)
  tokens, segments = right_align(prompts)
  for b, n in enumerate(LENGTHS):
    np.testing.assert_array_equal(tokens[b], [0] * (P - n) + list(prompts.tokens[b, :n]))
    np.testing.assert_array_equal(segments[b], [0] * (P - n) + [1] * n)


@pytest.mark.parametrize("fields", [{}, dict(layer_pattern=("local", "global"), window=3)],
                         ids=["global", "windowed"])
def test_greedy_equals_a_loop_of_full_forwards(make_model, rng, fields):
  model, variables = make_model(int(rng.integers(1 << 30)), **fields)
  prompts = _prompts(rng)
  # Ids that the model does like: stops happen early, late and not at all.
  stop_ids = (3, 8, 15, 22)
  out = sample(model, (variables,), prompts, jax.random.key(0), max_new_tokens=N,
               stop_ids=stop_ids, sampling=Sampling(temperature=0.0))
  naive = Naive(model)
  for b, n in enumerate(LENGTHS):
    row, logp, hit = list(prompts.tokens[b, :n]), [], False
    while n and len(logp) < N and not hit:
      log_p = np.asarray(_log_softmax(naive(variables, row)))
      row.append(int(np.argmax(log_p)))
      logp.append(log_p[row[-1]])
      hit = row[-1] in stop_ids
    new = len(logp)
    assert int(out.lengths[b]) == new and bool(out.hit_eos[b]) == hit
    np.testing.assert_array_equal(out.tokens[b], [0] * (P - n) + row + [0] * (N - new))
    np.testing.assert_array_equal(
        out.segment_ids[b], [0] * (P - n) + [1] * (n + new) + [0] * (N - new)
    )
    np.testing.assert_allclose(out.logp[b], logp + [0.0] * (N - new), atol=2e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=4, top_p=0.8)],
                         ids=["policy", "filtered"])
def test_logp_is_that_of_the_policy_whatever_the_behaviour(make_model, rng, sampling):
  model, variables = make_model(int(rng.integers(1 << 30)))
  prompts = _prompts(rng)
  out = sample(model, (variables,), prompts, jax.random.key(int(rng.integers(1 << 30))),
               max_new_tokens=N, stop_ids=(1, 2), sampling=sampling)
  scored = token_logprobs(model, variables, out.tokens, out.segment_ids, start=P)
  mask = np.arange(N) < np.asarray(out.lengths)[:, None]
  np.testing.assert_allclose(out.logp, np.where(mask, scored.logp, 0.0), atol=1e-4)
  assert np.asarray(out.logp)[mask].min() < -0.1


def test_an_end_token_inside_a_prompt_or_as_padding_ends_nothing(make_model, rng):
  """Padding is id 0 here, and 0 ends a response: only lengths tell them apart."""
  model, variables = make_model(int(rng.integers(1 << 30)), vocab_size=4)
  prompts = PromptBatch(
      tokens=np.zeros((64, P), np.int32), lengths=rng.integers(1, P + 1, 64).astype(np.int32)
  )
  out = sample(model, (variables,), prompts, jax.random.key(1), max_new_tokens=N, stop_ids=(0,))
  tokens, lengths = np.asarray(out.tokens)[:, P:], np.asarray(out.lengths)
  assert (lengths >= 1).all() and len(set(lengths)) > 1
  for row, n, hit in zip(tokens, lengths, np.asarray(out.hit_eos)):
    assert 0 not in row[: n - 1]
    assert hit == (row[n - 1] == 0) and (hit or n == N)
    np.testing.assert_array_equal(row[n:], 0)
  np.testing.assert_array_equal(
      out.segment_ids,
      np.concatenate([np.arange(P) >= P - prompts.lengths[:, None],
                      np.arange(N) < lengths[:, None]], axis=1),
  )
  assert (np.asarray(out.logp)[np.arange(N) < lengths[:, None]] < 0).all()


def test_decoding_stops_when_every_row_is_done(make_model, rng):
  model, variables = make_model(0)
  calls = []

  class Counted:
    cfg = model.cfg

    def apply(self, variables, *args, **kwargs):
      if kwargs.get("method") != "unembed":
        jax.debug.callback(lambda: calls.append(1))
      return model.apply(variables, *args, **kwargs)

  prompts = _prompts(rng)
  run = jax.jit(lambda stop: generate(
      Counted(), (variables,), prompts, jax.random.key(5), max_new_tokens=N,
      stop_ids=stop, sampling=Sampling(temperature=0.0)), static_argnums=0)
  lengths = run((3, 8, 15, 22, 11, 12, 13, 14, 27, 28)).lengths
  jax.effects_barrier()
  assert len(calls) == int(max(lengths))  # the prefill and one a further token.
  calls.clear()
  out = run(tuple(range(29)))  # anything ends it.
  jax.effects_barrier()
  assert len(calls) == 1
  np.testing.assert_array_equal(out.lengths, (np.asarray(LENGTHS) > 0).astype(int))


def test_fillers_alone_end_at_once(make_model, rng):
  model, variables = make_model(0)
  out = sample(model, (variables,), _prompts(rng, lengths=(0,) * 6), jax.random.key(0),
               max_new_tokens=N, stop_ids=(1,))
  for x in (out.tokens, out.segment_ids, out.lengths, out.hit_eos, out.logp):
    np.testing.assert_array_equal(np.asarray(x), 0)


def test_a_row_does_not_depend_on_its_neighbours(make_model, rng):
  model, variables = make_model(int(rng.integers(1 << 30)))
  prompts = _prompts(rng)
  greedy = dict(max_new_tokens=N, stop_ids=(1, 2), sampling=Sampling(temperature=0.0))
  whole = sample(model, (variables,), prompts, jax.random.key(0), **greedy)
  order = rng.permutation(len(LENGTHS))
  shuffled = sample(model, (variables,), jax.tree.map(lambda x: x[order], prompts),
                    jax.random.key(0), **greedy)
  np.testing.assert_array_equal(np.asarray(whole.tokens)[order], shuffled.tokens)


def test_contrastive_decoding_equals_mixed_logits(make_model, rng):
  model, sft = make_model(int(rng.integers(1 << 30)))
  _, ref = make_model(int(rng.integers(1 << 30)))
  prompts, alpha = _prompts(rng), 0.7
  out = sample(model, (sft, ref), prompts, jax.random.key(0), max_new_tokens=N, stop_ids=(1, 2),
               sampling=Sampling(temperature=0.0), weights=(1 + alpha, -alpha))
  naive = Naive(model)
  for b, n in enumerate(LENGTHS):
    row = list(prompts.tokens[b, :n])
    for t in range(int(out.lengths[b])):
      mixed = (1 + alpha) * naive(sft, row) - alpha * naive(ref, row)
      row.append(int(np.argmax(mixed)))
      assert int(out.tokens[b, P + t]) == row[-1]
      assert float(out.logp[b, t]) == pytest.approx(float(_log_softmax(mixed)[row[-1]]), abs=1e-4)


def test_sampled_sequences_follow_the_exact_distribution(make_model):
  """All 7 sequences of at most 2 tokens over 3 ids, at a fixed seed (6 degrees: 0.999 at 22.5)."""
  model, variables = make_model(4, vocab_size=3)
  rows = 20_000
  prompts = PromptBatch(tokens=np.full((rows, P), 2, np.int32), lengths=np.full(rows, 2, np.int32))
  out = sample(model, (variables,), prompts, jax.random.key(3), max_new_tokens=2, stop_ids=(0,))
  seen = {}
  for row, n in zip(np.asarray(out.tokens)[:, P:].tolist(), np.asarray(out.lengths)):
    seen[tuple(row[:n])] = seen.get(tuple(row[:n]), 0) + 1
  naive, exact = Naive(model), {}
  for first, p in enumerate(np.exp(_log_softmax(naive(variables, [2, 2])))):
    if first == 0:
      exact[(0,)] = p
      continue
    for second, q in enumerate(np.exp(_log_softmax(naive(variables, [2, 2, first])))):
      exact[(first, second)] = p * q
  assert sum(exact.values()) == pytest.approx(1.0, abs=1e-5) and set(seen) <= set(exact)
  assert min(exact.values()) * rows > 1
  chi = sum((seen.get(y, 0) - rows * p) ** 2 / (rows * p) for y, p in exact.items())
  assert len(exact) == 7 and chi < 22.5


@pytest.mark.parametrize("fields", [{}, dict(layer_pattern=("local", "global"), window=3),
                                    dict(layer_pattern=("local",), window=8)],
                         ids=["global", "windowed", "wide_window"])
@pytest.mark.parametrize("slots,samples,refill", [(2, 1, 0.5), (3, 2, 0.01), (1, 3, 1.0),
                                                  (5, 2, 1.0)])
def test_a_queue_samples_what_the_plain_batch_samples(
    make_model, rng, fields, slots, samples, refill
):
  """Refilled slots, whatever their number: a row depends on its key and its prompt alone."""
  model, variables = make_model(int(rng.integers(1 << 30)), **fields)
  prompts = _prompts(rng, lengths=LENGTHS * 4)
  key = jax.random.key(int(rng.integers(1 << 30)))
  how = dict(max_new_tokens=N, stop_ids=tuple(range(10)), samples_per_prompt=samples,
             with_entropy=True)
  plain = sample(model, (variables,), prompts, key, **how)
  queue = sample(model, (variables,), prompts, key, slots=slots, refill=refill, **how)
  for name in ("tokens", "segment_ids", "lengths", "hit_eos"):
    np.testing.assert_array_equal(getattr(queue, name), getattr(plain, name), name)
  np.testing.assert_allclose(queue.logp, plain.logp, atol=2e-5)
  np.testing.assert_allclose(queue.entropy, plain.entropy, atol=2e-5)
  assert len(set(np.asarray(plain.lengths))) > 2  # of different lengths, so that slots get free.
  # All tokens but each row's first take a step of a slot.
  fed = np.maximum(np.asarray(plain.lengths) - 1, 0)
  assert fed.sum() / slots <= int(queue.steps) <= fed.sum()
  assert int(plain.steps) == fed.max()


def test_parts_of_a_batch_sample_what_the_whole_samples(make_model, rng):
  model, variables = make_model(int(rng.integers(1 << 30)))
  prompts, key = _prompts(rng), jax.random.key(int(rng.integers(1 << 30)))
  half = len(LENGTHS) // 2
  how = dict(max_new_tokens=N, stop_ids=(1, 2), samples_per_prompt=2)
  whole = sample(model, (variables,), prompts, key, **how)
  keys = row_keys(key, 2 * len(LENGTHS))
  part = jax.jit(lambda prompts, keys: generate(model, (variables,), prompts, keys, **how))
  parts = [part(jax.tree.map(lambda x: x[at], prompts), keys[2 * at.start : 2 * at.stop])  # noqa: B023
           for at in (slice(0, half), slice(half, len(LENGTHS)))]
  np.testing.assert_array_equal(np.concatenate([x.tokens for x in parts]), whole.tokens)


def test_samples_of_a_prompt_differ_and_share_one_prefill(make_model, rng):
  model, variables = make_model(int(rng.integers(1 << 30)))
  widths = []

  class Counted:
    cfg = model.cfg

    def apply(self, variables, tokens, *args, **kwargs):
      if kwargs.get("method") == "prefill":
        widths.append(tokens.shape)
      return model.apply(variables, tokens, *args, **kwargs)

  prompts = _prompts(rng)
  out = jax.jit(lambda key: generate(
      Counted(), (variables,), prompts, key, max_new_tokens=N, stop_ids=(1, 2),
      samples_per_prompt=4))(jax.random.key(3))
  assert widths == [(len(LENGTHS), P)]
  rows = np.asarray(out.tokens).reshape(len(LENGTHS), 4, P + N)
  assert (rows[:, :, :P] == rows[:, :1, :P]).all()
  assert len({tuple(r) for r in rows[0, :, P:]}) > 1
  scored = token_logprobs(model, variables, out.tokens, out.segment_ids, start=P)
  np.testing.assert_allclose(out.logp, np.where(out.mask > 0, scored.logp, 0.0), atol=1e-4)


def test_entropy_is_that_of_the_distributions_sampled_from(make_model, rng):
  model, variables = make_model(int(rng.integers(1 << 30)))
  out = sample(model, (variables,), _prompts(rng), jax.random.key(2), max_new_tokens=N,
               stop_ids=(1, 2), with_entropy=True)
  scored = token_logprobs(model, variables, out.tokens, out.segment_ids, start=P,
                          with_entropy=True)
  np.testing.assert_allclose(out.entropy, np.where(out.mask > 0, scored.entropy, 0.0), atol=1e-4)
  assert np.asarray(out.entropy).max() > 0.1
