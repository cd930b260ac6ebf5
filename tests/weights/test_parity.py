"""The decoder equals transformers in float32, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import Transformer, init_cache, token_logprobs
from dpr_jax.weights import load_pretrained
from dpr_jax.weights.names import flatten, tensor_specs

torch = pytest.importorskip("torch")

CASES = [
  "llama", "smollm2", "llama3", "llama_linear", "qwen2", "qwen2_window", "qwen3", "mistral",
  "mistral_full", "gemma3", "gemma3_uneven",
]
# One case per family and kind of window, on which decoding and gradients depend.
DECODED = ["llama", "qwen2_window", "qwen3", "mistral", "gemma3", "gemma3_uneven"]
DIFFERENTIATED = ["llama", "llama3", "qwen2", "qwen3", "mistral", "gemma3"]
B, T, V = 3, 20, 96  # T exceeds every window.
ATOL = 1e-4


def _logits(cfg, params, tokens, segments, cache=None):
  model = Transformer(cfg)
  hidden, cache = model.apply({"params": params}, tokens, None, segments, cache)
  return model.apply({"params": params}, hidden, method="unembed"), cache


logits_fn = jax.jit(_logits, static_argnums=0)


def _torch_logits(model, tokens, mask):
  """Reference logits; positions count real tokens only, wherever the padding is."""
  mask = torch.tensor(np.asarray(mask))
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  with torch.no_grad():
    out = model(torch.tensor(np.asarray(tokens)), attention_mask=mask, position_ids=positions)
  return out.logits.numpy()


def _padded(rng, side):
  """(tokens, mask): the first row full, the others padded on one side."""
  tokens = rng.integers(3, V, (B, T))
  mask = np.ones((B, T), np.int64)
  for row, pad in enumerate((0, 1, 9)):
    if pad:
      mask[row, :pad] = 0
    if pad and side == "right":
      mask[row] = mask[row, ::-1]
  return tokens * mask, mask


@pytest.mark.parametrize("case", CASES)
def test_logits_with_padding_on_either_side(reference, rng, case):
  model, folder = reference(case)
  cfg, params = load_pretrained(folder)
  for side in ("left", "right"):
    tokens, mask = _padded(rng, side)
    ours, _ = logits_fn(cfg, params, jnp.asarray(tokens), jnp.asarray(mask, jnp.int32))
    theirs = _torch_logits(model, tokens, mask)
    assert np.std(theirs[mask == 1]) > 0.3  # Large compared with the tolerance.
    np.testing.assert_allclose(np.asarray(ours)[mask == 1], theirs[mask == 1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", DECODED)
def test_cached_decode_equals_the_full_forward_of_transformers(reference, rng, case, side):
  """Prompts padded on one side, then tokens one by one: right padding leaves gaps in the slots."""
  model, folder = reference(case)
  cfg, params = load_pretrained(folder)
  prompt, prompt_mask = _padded(rng, side)
  columns = slice(0, 12) if side == "right" else slice(T - 12, T)
  prompt, prompt_mask = prompt[:, columns], prompt_mask[:, columns]
  new = rng.integers(3, V, (B, 6))
  cache = init_cache(cfg, B, 24)
  _, cache = logits_fn(cfg, params, jnp.asarray(prompt), jnp.asarray(prompt_mask, jnp.int32), cache)
  steps = []
  for t in range(new.shape[1]):
    logits, cache = logits_fn(cfg, params, jnp.asarray(new[:, t : t + 1]), None, cache)
    steps.append(np.asarray(logits)[:, 0])
  ours = np.stack(steps, 1)
  for row in range(B):
    whole = np.concatenate([prompt[row][prompt_mask[row] == 1], new[row]])[None]
    theirs = _torch_logits(model, whole, np.ones_like(whole))[0, -new.shape[1] :]
    np.testing.assert_allclose(ours[row], theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", DIFFERENTIATED)
def test_gradients_of_the_mean_log_prob(reference, rng, case):
  model, folder = reference(case)
  cfg, params = load_pretrained(folder)
  tokens = rng.integers(3, V, (2, T))

  def loss(params):
    out = token_logprobs(Transformer(cfg), {"params": params}, jnp.asarray(tokens))
    return jnp.mean(out.logp[:, 1:])

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  model.zero_grad()
  x = torch.tensor(tokens)
  logp = torch.log_softmax(model(x).logits[:, :-1], -1).gather(-1, x[:, 1:, None]).mean()
  logp.backward()
  np.testing.assert_allclose(value, logp.item(), atol=1e-5)
  theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
  grads = flatten(grads)
  for spec in tensor_specs(cfg):
    leaf = np.asarray(grads[spec.path])
    ours = spec.to_file(leaf if spec.repeat is None else leaf[spec.repeat])
    want = theirs[spec.name]
    assert np.abs(want).max() > 0, spec.name
    error = np.abs(ours - want).max() / np.abs(want).max()
    assert error < 1e-3, f"{spec.name}: {error}"
