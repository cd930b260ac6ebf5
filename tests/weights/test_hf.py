"""Reading and writing Hugging Face folders."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig
from dpr_jax.weights import (
  hf,
  load_config,
  load_generation_config,
  load_pretrained,
  load_tokenizer,
  placement,
  save_pretrained,
)
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.weights.names import abstract_params, flatten, tensor_specs

FAMILY_CASES = ["llama", "smollm2", "llama3", "qwen2", "qwen3", "mistral", "gemma3"]


def _random_model(**fields):
  cfg = ModelConfig(
    **dict(vocab_size=272, hidden_size=16, mlp_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
           head_dim=8) | fields
  )
  rng = np.random.default_rng(0)
  shapes = nn.unbox(abstract_params(cfg))
  return cfg, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.fixture
def folder(tmp_path):
  """A complete small model folder made by `save_pretrained`."""
  cfg, params = _random_model(tied_head=False)
  save_pretrained(tmp_path / "model", cfg, params, byte_tokenizer())
  return tmp_path / "model"


def _tensors(folder):
  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    out |= load_file(file)
  return out


def _equal_trees(a, b):
  a, b = flatten(a), flatten(b)
  assert set(a) == set(b)
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=str(path))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_round_trip_is_bit_identical_and_loads_in_transformers(reference, tmp_path, case):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  model, folder = reference(case)
  cfg, params = load_pretrained(folder)
  out = tmp_path / "out"
  family = "mistral" if case == "mistral" else None
  save_pretrained(out, cfg, params, dtype=None, family=family)
  before, after = _tensors(folder), _tensors(out)
  assert set(before) == set(after)
  for name in before:
    assert before[name].dtype == after[name].dtype
    assert before[name].tobytes() == after[name].tobytes(), name
  again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
  assert type(again) is type(model)
  x = torch.randint(3, 96, (2, 20))
  with torch.no_grad():
    assert torch.equal(again(x).logits, model(x).logits)
  _equal_trees(load_pretrained(out)[1], params)


@pytest.mark.parametrize("case", ["qwen2", "gemma3"])
def test_bfloat16_in_several_files(hf_model, logits_of, tmp_path, case):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  model = hf_model(case).to(torch.bfloat16)
  model.save_pretrained(tmp_path, max_shard_size="12KB")
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
  cfg, params = load_pretrained(tmp_path)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  state = {k: v.float().numpy() for k, v in model.state_dict().items()}
  for spec in tensor_specs(cfg):
    leaf = np.asarray(flatten(params)[spec.path].astype(jnp.float32))
    np.testing.assert_array_equal(
      spec.to_file(leaf if spec.repeat is None else leaf[spec.repeat]), state[spec.name]
    )
  # In float32 the values are the same, and so are the logits of the float32 model.
  _, wide = load_pretrained(tmp_path, dtype="float32")
  assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
  x = torch.randint(3, 96, (2, 20))
  model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  with torch.no_grad():
    theirs = model(x).logits.numpy()
  ours = logits_of(cfg, wide, jnp.asarray(x.numpy()))
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_export_dtype_and_several_files(tmp_path, monkeypatch, dtype):
  monkeypatch.setattr(hf, "SHARD_BYTES", 9_000)
  cfg, params = _random_model(tied_head=False)
  save_pretrained(tmp_path, cfg, params, dtype=dtype)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
  assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
  stored = _tensors(tmp_path)
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
  kind = np.dtype(dtype or "float32") if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
  assert {x.dtype for x in stored.values()} == {kind}
  _, back = load_pretrained(tmp_path)
  _equal_trees(back, jax.tree.map(lambda x: x.astype(kind), params))
  # A later, smaller export leaves nothing of the earlier one.
  monkeypatch.undo()
  save_pretrained(tmp_path, cfg, params, dtype=dtype)
  assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_exported_folder_is_complete(tmp_path):
  transformers = pytest.importorskip("transformers")
  cfg, params = _random_model()
  tokenizer = byte_tokenizer()
  save_pretrained(tmp_path, cfg, params, tokenizer, {"temperature": 0.7, "eos_token_id": [260, 3]})
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
  assert config["pad_token_id"] == tokenizer.pad_token_id and config["bos_token_id"] is None
  assert config["eos_token_id"] == [260, 3]
  assert load_generation_config(tmp_path) == {
    "temperature": 0.7, "eos_token_id": [260, 3], "pad_token_id": tokenizer.pad_token_id
  }
  assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [260, 3]
  chat = [{"role": "user", "content": "Wie geht's? \u00e9\u4e2d\U0001f600"}]
  # As transformers 4 reads them: a class that it has, and no list of special tokens under the
  # name that it takes for a mapping.
  fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert "extra_special_tokens" not in fields
  assert set(fields["additional_special_tokens"]) == {"<|user|>", "<|assistant|>", "<|system|>"}
  for loaded in (load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)):
    for text in ("a b  c\n", "<|user|>x<|end|>", chat[0]["content"]):
      assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
      assert loaded.decode(loaded(text)["input_ids"]) == text
    rendered, wanted = (
      t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
      for t in (loaded, tokenizer)
    )
    assert rendered == wanted
    assert loaded.eos_token_id == tokenizer.eos_token_id
  assert load_config(tmp_path) == cfg


def test_numpy_parameters_are_exported_too(tmp_path):
  cfg, params = _random_model()
  save_pretrained(tmp_path, cfg, jax.tree.map(np.asarray, params))
  _equal_trees(load_pretrained(tmp_path)[1], params)


def test_tables_are_read_in_blocks(folder, monkeypatch):
  _, whole = load_pretrained(folder)
  monkeypatch.setattr(placement, "BLOCK_BYTES", 4 * 16 * 5)  # 5 of 272 rows: a short last block.
  _, blocks = load_pretrained(folder)
  _equal_trees(whole, blocks)


def _multimodal(folder, rename, extra):
  """Rewrites a Gemma 3 text folder as the multimodal checkpoint that contains it."""
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}})
  )
  tensors = {rename(name): x for name, x in load_file(folder / "model.safetensors").items()}
  tensors |= {name: np.ones(3, np.float32) for name in extra}
  save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("new", [False, True])
def test_the_text_part_of_a_multimodal_gemma(reference, tmp_path, new):
  _, source = reference("gemma3")
  shutil.copytree(source, tmp_path / "m")
  prefix = "model.language_model." if new else "language_model.model."
  vision = ["vision_tower.a.weight", "multi_modal_projector.b"]
  _multimodal(
    tmp_path / "m",
    lambda name: prefix + name.removeprefix("model."),
    [("model." if new else "") + name for name in vision],
  )
  cfg, params = load_pretrained(tmp_path / "m")
  want_cfg, want = load_pretrained(source)
  assert cfg == want_cfg
  _equal_trees(params, want)


def test_a_multimodal_gemma_of_transformers(logits_of, tmp_path):
  torch = pytest.importorskip("torch")
  from transformers import Gemma3Config, Gemma3ForConditionalGeneration

  text = dict(
    vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=3, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
    sliding_window_pattern=2,
  )
  vision = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
  )
  config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                        image_token_index=95, boi_token_index=94, eoi_token_index=93)
  model = Gemma3ForConditionalGeneration(config).eval()
  model.save_pretrained(tmp_path)
  cfg, params = load_pretrained(tmp_path)
  x = torch.randint(3, 90, (2, 20))
  with torch.no_grad():
    theirs = model(input_ids=x).logits.numpy()
  ours = logits_of(cfg, params, jnp.asarray(x.numpy()))
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path):
  cfg, params = _random_model()
  save_pretrained(tmp_path, cfg, params)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, file)
  _equal_trees(load_pretrained(tmp_path)[1], params)
  tensors["lm_head.weight"][271, 3] += 1
  save_file(tensors, file)
  with pytest.raises(UserError, match="tie_word_embeddings"):
    load_pretrained(tmp_path)


# --- what can be wrong ---


def _edit(folder, change):
  file = folder / "model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


def _index(folder, weight_map):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _cut(folder, keep):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])


def _patch_header(folder, change):
  file = folder / "model.safetensors"
  data = file.read_bytes()
  n = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + n])
  change(header)
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def _only_pickle(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


NORM = "model.norm.weight"
BAD = {
  "cut data": (lambda f: _cut(f, -100), ["model.safetensors", "cut short"]),
  "cut header": (lambda f: _cut(f, 50), ["model.safetensors", "cut short"]),
  "empty": (lambda f: _cut(f, 0), ["model.safetensors", "cut short"]),
  "not safetensors": (
    lambda f: (f / "model.safetensors").write_bytes(b"\x20" + b"\0" * 7 + b"x" * 64),
    ["model.safetensors", "header"],
  ),
  "missing tensor": (
    lambda f: _edit(f, lambda t: t.pop(NORM)), ["'model.norm.weight' is missing"]
  ),
  "leftover tensor": (
    lambda f: _edit(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]})),
    ["'model.layers.0.self_attn.q_proj.bias'", "no place"],
  ),
  "layer too many": (
    lambda f: _edit(f, lambda t: t.update({"model.layers.2.input_layernorm.weight": t[NORM]})),
    ["'model.layers.2.input_layernorm.weight'"],
  ),
  "wrong shape": (
    lambda f: _edit(f, lambda t: t.update({NORM: np.ones(15, np.float32)})),
    ["'model.norm.weight' has shape [15]", "[16]"],
  ),
  "wrong dtype": (
    lambda f: _edit(f, lambda t: t.update({NORM: np.ones(16, np.int8)})),
    ["'model.norm.weight'", "dtype I8"],
  ),
  "bytes and shape differ": (
    lambda f: _patch_header(f, lambda h: h[NORM].update(shape=[8])),
    ["'model.norm.weight'", "do not match"],
  ),
  "negative offset": (
    lambda f: _patch_header(f, lambda h: h[NORM].update(data_offsets=[-64, 0])),
    ["'model.norm.weight'", "damaged"],
  ),
  "no offsets": (
    lambda f: _patch_header(f, lambda h: h[NORM].pop("data_offsets")),
    ["'model.norm.weight'", "damaged"],
  ),
  "weight_map outside": (
    lambda f: _index(f, {NORM: "../model.safetensors"}), ["weight_map", "'../model.safetensors'"]
  ),
  "weight_map absolute": (
    lambda f: _index(f, {NORM: "/etc/passwd"}), ["weight_map", "'/etc/passwd'"]
  ),
  "weight_map to a folder": (lambda f: _index(f, {NORM: ".."}), ["weight_map", "'..'"]),
  "weight_map missing file": (
    lambda f: _index(f, {NORM: "model-00001-of-00002.safetensors"}),
    ["model-00001-of-00002.safetensors", "does not exist"],
  ),
  "weight_map other file": (
    lambda f: _index(f, {NORM: "config.json"}), ["weight_map", "'config.json'"]
  ),
  "weight_map names a missing tensor": (
    lambda f: _index(f, {"model.nothing": "model.safetensors"}), ["'model.nothing' is missing"]
  ),
  "a stale index": (
    lambda f: (shutil.copy(f / "model.safetensors", f / "old.safetensors"),
               _index(f, {NORM: "old.safetensors"})),
    ["index.json", "model.safetensors, which lies beside it", "stale"],
  ),
  "no head": (
    lambda f: _edit(f, lambda t: t.pop("lm_head.weight")),
    ["'lm_head.weight' is missing", "tie_word_embeddings=false; set it to true"],
  ),
  "no weight_map": (lambda f: _index(f, []), ["weight_map must be"]),
  "pickle": (_only_pickle, ["pytorch_model.bin", "pickled"]),
  "no weights": (lambda f: (f / "model.safetensors").unlink(), ["has neither model.safetensors"]),
  "no config": (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
  "config is not JSON": (
    lambda f: (f / "config.json").write_text('{\n"a": 1,\n}'), ["config.json", "line 3", "JSON"]
  ),
  "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_line(folder, name):
  spoil, named = BAD[name]
  spoil(folder)
  with pytest.raises(UserError) as error:
    load_pretrained(folder)
  message = str(error.value)
  assert "\n" not in message and message.startswith(str(folder))
  for part in named:
    assert part in message


LOADERS = [load_pretrained, load_config, load_tokenizer, load_generation_config]


@pytest.mark.parametrize("load", LOADERS)
def test_a_path_that_is_no_model(tmp_path, load):
  with pytest.raises(UserError, match="does not exist"):
    load(tmp_path / "nowhere")
  (tmp_path / "model.bin").write_bytes(b"x")
  with pytest.raises(UserError, match="not a .gguf file"):
    load(tmp_path / "model.bin")


def test_a_bad_export_is_one_clear_line(tmp_path):
  cfg, params = _random_model(vocab_size=200)
  with pytest.raises(UserError, match="tokenizer has 261 tokens.* 200 rows"):
    save_pretrained(tmp_path / "a", cfg, params, byte_tokenizer())
  with pytest.raises(UserError, match="dtype='int8'"):
    save_pretrained(tmp_path / "a", cfg, params, dtype="int8")
  with pytest.raises(UserError, match="family: model_type='opt'"):
    save_pretrained(tmp_path / "a", cfg, params, family="opt")
  with pytest.raises(UserError, match="head/table"):
    save_pretrained(tmp_path / "a", cfg, {**params, "head": params["embed"]})
  other, _ = _random_model(vocab_size=201)
  with pytest.raises(UserError, match="embed/table"):
    save_pretrained(tmp_path / "a", other, params)
  assert not (tmp_path / "a").exists()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="not a folder"):
    save_pretrained(tmp_path / "file", cfg, params)
