"""GGUF files, written with the gguf package from models with known parameters."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.errors import UserError
from dpr_jax.models import Rope
from dpr_jax.models.attention import rope_frequencies
from dpr_jax.weights import load_config, load_generation_config, load_pretrained
from dpr_jax.weights.gguf_file import GGUFFile
from dpr_jax.weights.hf_config import canonical
from dpr_jax.weights.names import flatten, tensor_specs

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType

# Hugging Face -> GGUF, independent of the library's table, so that a mistake there shows.
NAMES = {
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}
NAMES_PRE = NAMES | {"post_attention_layernorm": "ffn_norm"}
NAMES_GEMMA = NAMES | {
  "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def _gguf_name(name, gemma):
  stem, leaf = name.rsplit(".", 1)
  names = NAMES_GEMMA if gemma else NAMES_PRE
  if stem.startswith("model.layers."):
    _, _, layer, below = stem.split(".", 3)
    return f"blk.{layer}.{names[below]}.{leaf}"
  return f"{names[stem]}.{leaf}"


def _interleave(w, heads):
  """llama.cpp's `permute` of q and k (convert_hf_to_gguf.py)."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, config, tensors, kind="F32", extra=None, arrays=None):
  """A GGUF of a transformers config and {Hugging Face name: float32 array}."""
  arch = ARCHS[config.model_type]
  gemma = arch == "gemma3"
  writer = gguf.GGUFWriter(path, arch)
  writer.add_context_length(config.max_position_embeddings)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  head_dim = tensors["model.layers.0.self_attn.q_proj.weight"].shape[0]
  head_dim //= config.num_attention_heads
  writer.add_key_length(head_dim)
  writer.add_value_length(head_dim)
  ropes = config.rope_parameters
  writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"] if gemma else ropes["rope_theta"])
  if gemma:
    writer.add_sliding_window(config.sliding_window)
  for add, key, value in extra or ():
    getattr(writer, add)(*([f"{arch}.{key}", value] if key else [value]))
  for name, w in tensors.items():
    w = np.asarray(w, np.float32)
    if gemma and "norm" in name:
      w = w + 1
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
      heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
      w = _interleave(w, heads)
    # llama.cpp keeps vectors in float32.
    own = TYPES[kind] if w.ndim == 2 else TYPES.F32
    block = gguf.GGML_QUANT_SIZES[own][0]
    own = own if w.shape[-1] % block == 0 else TYPES.F32
    writer.add_tensor(_gguf_name(name, gemma), gguf.quants.quantize(w, own), raw_dtype=own)
  for name, w in (arrays or {}).items():
    writer.add_tensor(name, w)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _state(model):
  tied = model.config.tie_word_embeddings
  return {
    name: w.detach().numpy()
    for name, w in model.state_dict().items()
    if not (tied and name == "lm_head.weight")
  }


@pytest.mark.parametrize("case", ["llama", "smollm2", "qwen2", "qwen3", "gemma3"])
def test_float32_gguf_equals_the_folder(hf_model, tmp_path, case):
  # Gemma's GGUF does not store these fields; llama.cpp hard-codes them.
  fixed = {}
  if case == "gemma3":
    fixed = dict(query_pre_attn_scalar=16, rope_parameters={
      "full_attention": {"rope_type": "default", "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    })
  model = hf_model(case, **fixed)
  model.save_pretrained(tmp_path / "hf")
  path = write(tmp_path / "m.gguf", model.config, _state(model))
  want_cfg, want = load_pretrained(tmp_path / "hf")
  cfg, params = load_pretrained(path)
  assert canonical(cfg) == canonical(want_cfg)
  assert load_config(path) == cfg
  atol = 1e-6 if case == "gemma3" else 0  # (w + 1) - 1 in float32.
  got = flatten(params)
  for name, leaf in flatten(want).items():
    np.testing.assert_allclose(got[name], leaf, atol=atol, rtol=0, err_msg=str(name))


def test_an_adapter_is_merged_into_its_gguf(hf_model, tmp_path, rng):
  """Under the names of Hugging Face, with the rows of q and k as they are there."""
  from dpr_jax.models.lora import LoRA, merge
  from dpr_jax.models.variables import random_variables
  from dpr_jax.sharding import make_mesh
  from dpr_jax.weights.peft import save_adapter

  model = hf_model("llama")
  path = write(tmp_path / "m.gguf", model.config, _state(model))
  cfg, params = load_pretrained(path)
  cfg = dataclasses.replace(cfg, lora=LoRA(rank=2, targets=("query", "key", "down")))
  lora = random_variables(cfg, make_mesh(), jax.random.key(0))["lora"]
  lora = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), lora)
  save_adapter(tmp_path / "adapter", cfg, lora, base=str(path))
  got = jax.tree.leaves(load_pretrained(tmp_path / "adapter")[1])
  want = jax.tree.leaves(merge({"params": params, "lora": lora}, cfg.lora)["params"])
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_gguf_holds_the_quantised_weights(hf_model, tmp_path, kind):
  model = hf_model("llama", hidden_size=64, intermediate_size=32)
  state = _state(model)
  path = write(tmp_path / "m.gguf", model.config, state, kind)
  cfg, params = load_pretrained(path)
  params = flatten(params)
  bits = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}.get(kind, 8)
  for spec in tensor_specs(cfg):
    leaf = params[spec.path]
    stored = {"F16": jnp.float16, "BF16": jnp.bfloat16}.get(kind, jnp.float32)
    assert leaf.dtype == (jnp.float32 if len(spec.shape) == 1 else stored)
    leaf = np.asarray(leaf.astype(jnp.float32))
    leaf = spec.to_file(leaf if spec.repeat is None else leaf[spec.repeat])
    error = np.abs(leaf - state[spec.name]).max()
    scale = np.abs(state[spec.name]).max() if len(spec.shape) == 2 else 0.0
    assert error <= 1.1 * scale / 2 ** (bits - 1), spec.name
  _, half = load_pretrained(path, dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


# --- block formats, decoded by loops that follow ggml's reference (ggml-quants.c) ---


def _f16(b):
  return float(np.frombuffer(bytes(b), np.float16)[0])


def _legacy(b, bits, has_min):
  d, at = _f16(b[:2]), 2
  m = 0.0
  if has_min:
    m, at = _f16(b[2:4]), 4
  high = 0
  if bits == 5:
    high, at = int.from_bytes(bytes(b[at : at + 4]), "little"), at + 4
  out = np.zeros(32)
  for j in range(16):
    for k, low in ((j, b[at + j] & 15), (j + 16, b[at + j] >> 4)):
      q = int(low) | (((high >> k) & 1) << 4)
      out[k] = d * q + m if has_min else d * (q - 2 ** (bits - 1))
  return out


def _q8_0(b):
  return _f16(b[:2]) * np.frombuffer(bytes(b[2:34]), np.int8)


def _scale_min(s, j):
  if j < 4:
    return int(s[j] & 63), int(s[j + 4] & 63)
  return int((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4)), int((s[j + 4] >> 4) | ((s[j] >> 6) << 4))


def _q45_k(b, five):
  d, dmin, scales, at = _f16(b[:2]), _f16(b[2:4]), b[4:16], 16
  high = b[at : at + 32] if five else np.zeros(32, np.uint8)
  q = b[at + 32 * five :]
  out = np.zeros(256)
  for j in range(8):  # sub-blocks of 32 weights.
    scale, minimum = _scale_min(scales, j)
    for l in range(32):
      byte = int(q[32 * (j // 2) + l])
      value = (byte & 15) if j % 2 == 0 else byte >> 4
      value += 16 * ((int(high[l]) >> j) & 1)
      out[32 * j + l] = d * scale * value - dmin * minimum
  return out


def _q6_k(b):
  low, high, scales, d = b[:128], b[128:192], b[192:208].view(np.int8), _f16(b[208:210])
  out = np.zeros(256)
  for half in range(2):
    for l in range(32):
      a, c = int(low[64 * half + l]), int(low[64 * half + l + 32])
      h = int(high[32 * half + l])
      values = ((a & 15, 0), (c & 15, 2), (a >> 4, 4), (c >> 4, 6))
      for k, (v, shift) in enumerate(values):
        q = (v | (((h >> shift) & 3) << 4)) - 32
        out[128 * half + 32 * k + l] = d * int(scales[8 * half + l // 16 + 2 * k]) * q
  return out


DECODERS = {
  "Q8_0": (_q8_0, (0,)),
  "Q4_0": (lambda b: _legacy(b, 4, False), (0,)),
  "Q4_1": (lambda b: _legacy(b, 4, True), (0, 2)),
  "Q5_0": (lambda b: _legacy(b, 5, False), (0,)),
  "Q5_1": (lambda b: _legacy(b, 5, True), (0, 2)),
  "Q4_K": (lambda b: _q45_k(b, False), (0, 2)),
  "Q5_K": (lambda b: _q45_k(b, True), (0, 2)),
  "Q6_K": (_q6_k, (208,)),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_block_format_decodes_as_ggml_does(tmp_path, rng, kind):
  decode, halves = DECODERS[kind]
  block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
  rows, blocks = 5, 3
  raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
  for at in halves:  # scales of ordinary size, not random bits.
    scale = rng.uniform(0.01, 1, (rows, blocks, 1)).astype(np.float16)
    raw[:, :, at : at + 2] = scale.view(np.uint8)
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_tensor("x", raw.reshape(rows, -1), raw_dtype=TYPES[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  file = GGUFFile(tmp_path / "m.gguf")
  assert file.shapes == {"x": (rows, blocks * block)}
  want = np.stack([np.concatenate([decode(b) for b in row]) for row in raw])
  got = file.read("x", 0, rows)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6 * np.abs(want).max())
  np.testing.assert_array_equal(file.read("x", 2, 4), got[2:4])


# --- configuration ---


def test_llama3_rope_scaling_is_recognised_from_its_divisors(hf_model, tmp_path):
  model = hf_model("smollm2", head_dim=128, num_attention_heads=1)
  theta = model.config.rope_parameters["rope_theta"]
  for factor in (8.0, 32.0):
    rope = Rope(theta, "llama3", factor, 1.0, 4.0, 8192)
    divisors = np.asarray(rope_frequencies(Rope(theta), 128) / rope_frequencies(rope, 128))
    arrays = {"rope_freqs.weight": divisors.astype(np.float32)}
    path = write(tmp_path / f"{factor}.gguf", model.config, _state(model), arrays=arrays)
    assert load_pretrained(path)[0].rope == rope
  arrays["rope_freqs.weight"] = arrays["rope_freqs.weight"] ** 1.1
  path = write(tmp_path / "odd.gguf", model.config, _state(model), arrays=arrays)
  with pytest.raises(UserError, match="rope_freqs.weight"):
    load_config(path)


def test_fields_of_gemma(hf_model, tmp_path):
  model = hf_model("gemma3")
  state = _state(model)
  linear = [
    ("add_string", "rope.scaling.type", "linear"), ("add_float32", "rope.scaling.factor", 8.0)
  ]
  cfg = load_config(write(tmp_path / "a.gguf", model.config, state, extra=linear))
  assert cfg.rope == Rope(1e6, "linear", 8.0) and cfg.local_rope == Rope(1e4)
  assert cfg.layer_pattern == ("local",) * 5 + ("global",) and cfg.window == 5
  own = [
    ("add_float32", "rope.freq_base_swa", 5e3),
    ("add_uint32", "attention.sliding_window_pattern", 4),
  ]
  cfg = load_config(write(tmp_path / "b.gguf", model.config, state, extra=own))
  assert cfg.local_rope == Rope(5e3) and cfg.layer_pattern == ("local",) * 3 + ("global",)
  flags = [("add_array", "attention.sliding_window_pattern", [True, True, False] * 2 + [True] * 2)]
  cfg = load_config(write(tmp_path / "c.gguf", model.config, state, extra=flags))
  assert cfg.layer_pattern == ("local", "local", "global")


def test_token_ids(hf_model, tmp_path):
  model = hf_model("llama")
  ids = [
    ("add_bos_token_id", None, 5), ("add_eos_token_id", None, 6), ("add_pad_token_id", None, 0),
    ("add_eot_token_id", None, 9),
  ]
  path = write(tmp_path / "m.gguf", model.config, _state(model), extra=ids)
  assert load_generation_config(path) == {
    "bos_token_id": 5, "eos_token_id": [6, 9], "pad_token_id": 0
  }


# --- what can be wrong ---


@pytest.mark.parametrize(
  "extra, named",
  [
    (("add_uint32", "expert_count", 8), "llama.expert_count=8"),
    (("add_float32", "attn_logit_softcapping", 50.0), "llama.attn_logit_softcapping=50.0"),
    (("add_float32", "residual_scale", 2.0), "llama.residual_scale=2.0"),
    (("add_uint32", "rope.dimension_count", 4), "llama.rope.dimension_count=4"),
    (("add_string", "rope.scaling.type", "yarn"), "llama.rope.scaling.type='yarn'"),
    (("add_uint32", "attention.sliding_window", 4096), "llama.attention.sliding_window=4096"),
    (("add_bool", "attention.causal", False), "llama.attention.causal=False"),
  ],
)
def test_a_key_that_is_not_implemented_is_refused_by_name(hf_model, tmp_path, extra, named):
  model = hf_model("llama")
  path = write(tmp_path / "m.gguf", model.config, _state(model), extra=[extra])
  with pytest.raises(UserError) as error:
    load_config(path)
  assert str(error.value).startswith(f"{path}:") and named in str(error.value)


def _bare(path, arch="llama", kind=None, **tensors):
  writer = gguf.GGUFWriter(path, arch)
  for name, value in tensors.items():
    writer.add_tensor(name, value, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_an_unknown_architecture(tmp_path):
  with pytest.raises(UserError, match="general.architecture='phi3'.*known: llama, qwen2"):
    load_pretrained(_bare(tmp_path / "m.gguf", "phi3"))
  with pytest.raises(UserError, match="llama.embedding_length=None"):
    load_pretrained(_bare(tmp_path / "n.gguf"))


def test_an_unsupported_tensor_type(tmp_path):
  size = gguf.GGML_QUANT_SIZES[TYPES.IQ4_XS][1]
  path = _bare(tmp_path / "m.gguf", kind=TYPES.IQ4_XS, x=np.zeros((2, size), np.uint8))
  with pytest.raises(UserError, match="tensor 'x' has type IQ4_XS.*Q4_K"):
    load_pretrained(path)
  data = path.read_bytes()
  kind = data.index(struct.pack("<I", int(TYPES.IQ4_XS)), data.index(b"x"))
  path.write_bytes(data[:kind] + struct.pack("<I", 9999) + data[kind + 4 :])
  with pytest.raises(UserError, match="tensor 'x' has the unknown type 9999"):
    load_pretrained(path)


def test_missing_wrong_and_leftover_tensors(hf_model, tmp_path):
  model = hf_model("llama")
  state = _state(model)
  less = {k: v for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}
  with pytest.raises(UserError, match="'blk.1.ffn_up.weight' is missing"):
    load_pretrained(write(tmp_path / "a.gguf", model.config, less))
  wrong = state | {"model.norm.weight": np.ones(5)}
  with pytest.raises(UserError, match=r"'output_norm.weight' has shape \[5\].*\[32\]"):
    load_pretrained(write(tmp_path / "b.gguf", model.config, wrong))
  more = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
  with pytest.raises(UserError, match="'blk.0.attn_q.bias' has no place"):
    load_pretrained(write(tmp_path / "c.gguf", model.config, state, arrays=more))


def test_a_damaged_file_is_one_clear_line_wherever_it_is_cut(hf_model, tmp_path):
  model = hf_model("llama")
  path = write(tmp_path / "m.gguf", model.config, _state(model))
  data = path.read_bytes()
  ends = [0, 3, 4, 7, 12, 20, 24, 30, 50, 100, 300, 600, 1000, len(data) // 2, len(data) - 64]
  for end in ends:
    path.write_bytes(data[:end])
    with pytest.raises(UserError) as error:
      load_pretrained(path)
    assert str(error.value).startswith(f"{path}:"), end
  path.write_bytes(b"GGML" + data[4:])
  with pytest.raises(UserError, match="not a GGUF"):
    load_pretrained(path)
  path.write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
  with pytest.raises(UserError, match="version 1"):
    load_pretrained(path)


def test_random_damage_of_the_table_never_gives_anything_but_a_user_error(hf_model, tmp_path, rng):
  model = hf_model("llama")
  path = write(tmp_path / "m.gguf", model.config, _state(model))
  data = path.read_bytes()
  table = data.index(b"output_norm")
  refused = 0
  for _ in range(200):
    at = int(rng.integers(4, table + 60))
    path.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :])
    try:
      load_config(path)
    except UserError:
      refused += 1
  assert refused > 50


def test_without_the_gguf_package(tmp_path, monkeypatch):
  path = _bare(tmp_path / "m.gguf")
  monkeypatch.setitem(__import__("sys").modules, "gguf", None)
  with pytest.raises(UserError, match=r"pip install -e .*gguf"):
    load_pretrained(path)


def test_the_config_of_a_gguf_is_frozen_and_hashable(hf_model, tmp_path):
  model = hf_model("llama")
  cfg = load_config(write(tmp_path / "m.gguf", model.config, _state(model)))
  assert hash(cfg) == hash(dataclasses.replace(cfg))
