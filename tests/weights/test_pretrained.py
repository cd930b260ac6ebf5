"""Published models: SmolLM2-135M-Instruct and Gemma-3-270M, both as 4-bit GGUF files.

Skipped without the files. The references are transformers on our export of the dequantised
weights, and the gguf package with its own name map.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import Transformer, init_cache, token_logprobs
from dpr_jax.weights import load_generation_config, load_pretrained, load_tokenizer, save_pretrained
from dpr_jax.weights.names import flatten, tensor_specs

torch = pytest.importorskip("torch")

TEXT = (
  "The lighthouse keeper counted 3,417 steps on the way up. Each winter, storms from the "
  "north-west would shake the lamp, and he wrote the hour of every gust into a ledger: 04:15, "
  "05:02, 05:40. \"Nobody will read this,\" he said, yet he never missed a line."
)
PROMPTS = [
  "The capital of France is",
  "def fibonacci(n):\n",
  "Water boils at 100 degrees Celsius because",
  "Once upon a time, in a village by the sea,",
]


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def loaded(request, tmp_path_factory):
  """(path, cfg, params, tokenizer, transformers model from our export, its folder)."""
  from transformers import AutoModelForCausalLM

  path = request.getfixturevalue(f"{request.param}_gguf")
  cfg, params = load_pretrained(path)
  tokenizer = load_tokenizer(path)
  folder = tmp_path_factory.mktemp(request.param)
  save_pretrained(folder, cfg, params, tokenizer, load_generation_config(path))
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  return path, cfg, params, tokenizer, model, folder


def test_log_probs_equal_those_of_transformers(loaded):
  _, cfg, params, tokenizer, model, _ = loaded
  ids = np.asarray([tokenizer(TEXT)["input_ids"]])
  assert ids.shape[1] > 60
  out = jax.jit(lambda p, x: token_logprobs(Transformer(cfg), {"params": p}, x))(params, ids)
  x = torch.tensor(ids)
  with torch.no_grad():
    logits = model(x).logits[:, :-1].double()
  theirs = torch.log_softmax(logits, -1).gather(-1, x[:, 1:, None])[..., 0].numpy()
  error = np.abs(np.asarray(out.logp)[:, 1:] - theirs).max()
  print(f"max |log-prob difference| {error:.2e}, mean log-prob {theirs.mean():.3f}")
  assert error <= 2e-3
  assert -5 < theirs.mean() < -1.5  # a language model, not noise.


def _greedy(cfg, params, prompts, steps):
  """Greedy tokens [B, steps] after prompts of different lengths, padded on the left."""
  model = Transformer(cfg)

  @jax.jit
  def step(params, tokens, segments, cache):
    hidden, cache = model.apply({"params": params}, tokens, None, segments, cache)
    logits = model.apply({"params": params}, hidden[:, -1:], method="unembed")
    return jnp.argmax(logits[:, -1], -1).astype(jnp.int32)[:, None], cache

  length = max(map(len, prompts))
  tokens = np.asarray([[0] * (length - len(ids)) + ids for ids in prompts], np.int32)
  segments = np.asarray([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], np.int32)
  cache, out = init_cache(cfg, len(prompts), length + steps), []
  for _ in range(steps):
    tokens, cache = step(params, tokens, segments, cache)
    segments = np.ones_like(tokens)
    out.append(np.asarray(tokens[:, 0]))
  return np.stack(out, 1)


@pytest.mark.slow
def test_greedy_continuations_equal_those_of_transformers(loaded):
  _, cfg, params, tokenizer, model, _ = loaded
  prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
  ours = _greedy(cfg, params, prompts, 32)
  for row, ids in enumerate(prompts):
    with torch.no_grad():
      theirs = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0,
      )[0, len(ids) :].tolist()
    assert len(theirs) == 32 and ours[row].tolist() == theirs, PROMPTS[row]


@pytest.mark.slow
def test_tensors_equal_those_of_the_gguf_package_and_its_name_map(loaded):
  """The reference is GGUFReader with its dequantisation and llama.cpp's map of tensor names."""
  gguf = pytest.importorskip("gguf")
  path, cfg, params, _, model, _ = loaded
  arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3_text": gguf.MODEL_ARCH.GEMMA3}
  names = gguf.get_tensor_name_map(arch[model.config.model_type], cfg.num_layers)
  stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
  params, state, seen = flatten(params), model.state_dict(), set()
  for spec in tensor_specs(cfg):
    tensor = stored[names.get_name(spec.name, try_suffixes=(".weight", ".bias"))]
    seen.add(tensor.name)
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if arch[model.config.model_type] == gguf.MODEL_ARCH.LLAMA:
      heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads}.get(spec.name.split(".")[-2])
      if heads:  # the inverse of llama.cpp's permutation, index by index.
        half = cfg.head_dim // 2
        rows = [
          h * cfg.head_dim + 2 * (i % half) + i // half
          for h in range(heads) for i in range(cfg.head_dim)
        ]
        want = want[rows]
    elif "norm" in spec.name:
      want = want - 1
    leaf = np.asarray(params[spec.path])
    ours = spec.to_file(leaf if spec.repeat is None else leaf[spec.repeat])
    np.testing.assert_array_equal(ours, want, err_msg=spec.name)
    np.testing.assert_array_equal(state[spec.name].numpy(), want, err_msg=spec.name)
  assert seen == set(stored)


@pytest.mark.slow
def test_tokenizer_equals_the_exported_one_and_that_of_transformers(loaded):
  from tokenizers import pre_tokenizers
  from transformers import AutoTokenizer

  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  path, cfg, _, tokenizer, _, folder = loaded
  assert len(tokenizer) == cfg.vocab_size
  exported = AutoTokenizer.from_pretrained(folder)
  arch, fields, _ = mapping.get_gguf_tokenizer(str(path))
  theirs, _ = mapping.convert_gguf_tokenizer(arch, fields)
  if fields.get("pre_tokenizer_type") == "smollm":  # transformers has no entry for it.
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
  bos = [tokenizer.bos_token_id] if arch == "gemma3" else []
  texts = [TEXT, *PROMPTS, "naïve 中文 😀\n\n\n  x  y\t", "<|im_start|>user\nhi<|im_end|>", " a"]
  for text in texts:
    ids = tokenizer(text)["input_ids"]
    assert ids == bos + theirs.encode(text, add_special_tokens=False).ids, text
    assert exported(text)["input_ids"] == ids
    assert tokenizer.decode(ids[len(bos) :]) == text
  assert exported.chat_template == tokenizer.chat_template
  assert exported.eos_token_id == tokenizer.eos_token_id


MEASURE = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from dpr_jax.weights import load_pretrained
jnp.zeros(8).block_until_ready()
def peak():
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return 1024 * int(next(l for l in lines if l.startswith("VmHWM")).split()[1])
before = peak()
_, params = load_pretrained(sys.argv[1])
leaves = jax.tree.leaves(params)
print(json.dumps([peak() - before, sum(x.nbytes for x in leaves)]))
"""


@pytest.mark.slow
def test_peak_memory_is_the_model_and_little_more(loaded):
  """Resident memory of a new process: the parameters, one block of rows and the metadata."""
  if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc")
  for path in (loaded[0], loaded[-1]):
    done = subprocess.run(
      [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    peak, size = json.loads(done.stdout)
    print(f"{path.name}: peak {peak / 1e6:.0f} MB above imports for {size / 1e6:.0f} MB of params")
    assert peak < size + 160e6
