"""responses.py and scoring.py against loops over single rows."""

import dataclasses

import jax
import numpy as np
import pytest

from dpr_jax import sharding
from dpr_jax.errors import UserError
from dpr_jax.evaluation.responses import Responder, prompt_seeds, response_text
from dpr_jax.evaluation.scoring import Scorer, score_record
from dpr_jax.references.base import Reference
from dpr_jax.rollout.sampling import Sampling
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

STOP = (7,)


@pytest.fixture
def mesh():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def ragged(rng, n, low, high):
  return [rng.integers(8, 29, rng.integers(low, high)).astype(np.int32) for _ in range(n)]


def naive_logps(model, variables, prompt, response):
  row = np.concatenate([prompt, response])[None, :]
  hidden, _ = model.apply(variables, row)
  logits = np.asarray(model.apply(variables, hidden, method="unembed"), np.float64)[0]
  logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
  logp -= logits.max(-1, keepdims=True)
  at = np.arange(len(prompt), row.shape[1])
  return logp[at - 1, row[0, at]]


def test_scores_of_ragged_responses(mesh, make_model, rng):
  model, sft = make_model(1)
  _, ref = make_model(2)
  prompts, responses = ragged(rng, 5, 1, 9), ragged(rng, 5, 1, 12)
  scores = Scorer(model, mesh, 2).score(sft, Reference.of(ref), prompts, responses)
  for p, r, s in zip(prompts, responses, scores, strict=True):
    np.testing.assert_allclose(s.logp_sft, naive_logps(model, sft, p, r), atol=1e-4)
    np.testing.assert_allclose(s.logp_ref, naive_logps(model, ref, p, r), atol=1e-4)
    np.testing.assert_array_equal(s.token_rewards, s.logp_sft - s.logp_ref)
    row = np.concatenate([p, r])[None, :]
    hidden, _ = model.apply(sft, row)
    logits = np.asarray(model.apply(sft, hidden, method="unembed"), np.float64)[0]
    expected = np.log(np.exp(logits[len(p) - 1 : -1]).sum(-1))  # Of the states that chose r.
    np.testing.assert_allclose(s.logsumexp_sft, expected, atol=1e-4)


def test_greedy_responses_do_not_depend_on_the_batch(mesh, make_model, rng):
  model, variables = make_model(3)
  prompts = ragged(rng, 19, 1, 9)  # a wave of 16 and one of 3.
  responder = Responder(model, mesh, 4, prompt_length=10, max_new_tokens=6, stop_ids=STOP)
  greedy, seen = Sampling(temperature=0), []
  together = responder.respond(
      (variables,), prompts, jax.random.key(0), sampling=greedy, on_batch=seen.append
  )
  assert seen == [16, 3]
  for prompt, response in list(zip(prompts, together, strict=True))[::3]:
    (alone,) = responder.respond((variables,), [prompt], jax.random.key(9), sampling=greedy)
    np.testing.assert_array_equal(alone.tokens, response.tokens)
    assert alone.hit_eos == response.hit_eos == (response.tokens[-1] in STOP)
    (logp,) = responder.scorer.logps(variables, [prompt], [response.tokens])
    assert response.logp == pytest.approx(logp.sum(), abs=1e-3)


def test_a_sampled_response_depends_on_its_prompt_and_number_alone(mesh, make_model, rng):
  """Not on the batch size, on another prompt before or after it, or on the order of the prompts."""
  model, variables = make_model(3)
  prompts, samples = ragged(rng, 18, 1, 9), 2
  responder = lambda rows: Responder(model, mesh, rows, 10, max_new_tokens=6, stop_ids=STOP)

  def sample(rows, prompts, **how):
    out = responder(rows).respond(
        (variables,), prompts, jax.random.key(5), samples_per_prompt=samples, **how
    )
    tokens = [r.tokens.tolist() for r in out]
    return [tokens[i : i + samples] for i in range(0, len(tokens), samples)]

  whole = sample(8, prompts)
  assert len({str(t) for of_prompt in whole for t in of_prompt}) > 9 * samples
  assert sample(3, prompts) == whole
  more = [np.full(9, 11, np.int32)]
  assert sample(8, more + prompts)[1:] == sample(8, prompts + more)[:-1] == whole
  assert sample(8, prompts[::-1]) == whole[::-1]
  half = slice(9, 18)
  assert sample(8, prompts[half], seeds=prompt_seeds(prompts)[half]) == whole[half]


def test_equal_prompts_get_responses_of_their_own(mesh, make_model):
  model, variables = make_model(3)
  responder = Responder(model, mesh, 8, prompt_length=10, max_new_tokens=6, stop_ids=STOP)
  out = responder.respond((variables,), [np.asarray([9, 10])] * 8, jax.random.key(5))
  assert len({tuple(r.tokens) for r in out}) > 4


def test_text_leaves_out_what_ended_the_response():
  tokenizer = byte_tokenizer()
  end = tokenizer.eos_token_id
  assert response_text(tokenizer, np.asarray([104, 105, end]), True, (end,)) == "hi"
  assert response_text(tokenizer, [104, 105], False, (end,)) == "hi"
  assert response_text(tokenizer, [end], True, (end,)) == ""
  text = lambda *stops: response_text(tokenizer, list(b"to be or"), True, (end,), stops)
  assert text(" be") == "to" and text("r", "o b") == "t" and text("no") == "to be or"
  assert text("to") == ""


@pytest.mark.parametrize("samples", [1, 2])
def test_stop_strings_end_responses_and_are_cut_off(mesh, make_model, rng, samples):
  tokenizer, strings = byte_tokenizer(), ("a", "e", "1", " ", "\n", "\x00", "\x01", "\x02")
  model, variables = make_model(3, vocab_size=261)
  prompts = [rng.integers(0, 256, 5).astype(np.int32) for _ in range(6)]
  plain = Responder(model, mesh, 4, 10, 60, (260,), tokenizer=tokenizer)
  stopping = dataclasses.replace(plain, stop_strings=strings)
  free, out = (
      r.respond((variables,), prompts, jax.random.key(0), samples_per_prompt=samples)
      for r in (plain, stopping)
  )
  ended = 0
  for whole, response in zip(free, out, strict=True):
    text = response_text(tokenizer, whole.tokens, whole.hit_eos, (260,))
    first = min((text.index(s) for s in strings if s in text), default=None)
    got = response_text(tokenizer, response.tokens, response.hit_eos, (260,), strings)
    assert got == text[:first]
    assert response.hit_eos == (first is not None or whole.hit_eos)
    n = len(response.tokens)
    np.testing.assert_array_equal(response.tokens, whole.tokens[:n])
    assert n == len(whole.tokens) or any(s in tokenizer.decode(response.tokens) for s in strings)
    assert not any(s in tokenizer.decode(response.tokens[:-1]) for s in strings)
    ended += first is not None
  assert ended
  with pytest.raises(UserError, match="stop string '' is empty"):
    dataclasses.replace(plain, stop_strings=("a", "")).respond(
        (variables,), prompts, jax.random.key(0)
    )


def test_a_record_sums_to_the_log_ratio(mesh, make_model, rng):
  model, sft = make_model(1)
  _, ref = make_model(2)
  (prompt,), (response,) = ragged(rng, 1, 4, 5), ragged(rng, 1, 6, 7)
  (scores,) = Scorer(model, mesh, 1).score(sft, Reference.of(ref), [prompt], [response])
  record = score_record(byte_tokenizer(), response, scores)
  expected = sum(
      sign * naive_logps(model, v, prompt, response).sum() for sign, v in ((1, sft), (-1, ref))
  )
  assert record["reward"] == pytest.approx(expected, abs=1e-3)
  assert len(record["tokens"]) == len(record["token_rewards"]) == 6


def test_samples_of_a_prompt_are_adjacent_and_differ(mesh, make_model, rng):
  model, variables = make_model(3)
  prompts = ragged(rng, 3, 1, 9)
  responder = Responder(model, mesh, 4, prompt_length=10, max_new_tokens=6, stop_ids=STOP)
  out = responder.respond((variables,), prompts, jax.random.key(0), samples_per_prompt=3)
  assert len(out) == 9 and len({tuple(r.tokens) for r in out}) > 3
  for i, response in enumerate(out):
    (logp,) = responder.scorer.logps(variables, [prompts[i // 3]], [response.tokens])
    assert response.logp == pytest.approx(logp.sum(), abs=1e-3)


def test_a_reference_of_several_models_scores_as_its_combination(mesh, make_model, rng):
  (model, first), (_, second) = make_model(1), make_model(2)
  prompts, responses = ragged(rng, 3, 1, 9), ragged(rng, 3, 1, 12)
  scorer = Scorer(model, mesh, 2)
  alone = [scorer.logps(v, prompts, responses) for v in (first, second)]
  mean = scorer.reference_logps(Reference((first, second), "mean_logp"), prompts, responses)
  mixture = scorer.reference_logps(Reference((first, second)), prompts, responses)
  for a, b, x, y in zip(*alone, mean, mixture, strict=True):
    np.testing.assert_allclose(x, (a + b) / 2, atol=1e-5)
    np.testing.assert_allclose(y, np.log((np.exp(a) + np.exp(b)) / 2), atol=1e-5)


def test_a_batch_that_does_not_split_over_the_mesh_is_refused(make_model):
  mesh = jax.sharding.AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor"))
  with pytest.raises(ValueError, match="batch_size=6"):
    Responder(make_model(1)[0], mesh, 6, prompt_length=10, max_new_tokens=6, stop_ids=STOP)
