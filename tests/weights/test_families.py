"""A model family is one record in families.py: nothing else knows its name."""

import ast
import json
import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from dpr_jax import weights
from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig, init_variables
from dpr_jax.weights.families import FAMILIES, Family, GGUFFacts
from dpr_jax.weights.hf_config import canonical, family_of, from_hf, to_hf
from dpr_jax.weights.names import GGUF, flatten, tensor_specs

EXAMPLEMO = Family(
  "examplemo", "ExamplemoForCausalLM", GGUFFacts("exmo", interleaved=True),
  multimodal="examplemo_vision", qk_norm=True, activation="act_fn",
  defaults={"rope_theta": 5e5}, constants={"mlp_bias": False},
)
CFG = ModelConfig(
  vocab_size=24, hidden_size=16, mlp_size=20, num_layers=2, num_heads=4, num_kv_heads=2,
  head_dim=8, max_length=64, qk_norm=True, activation="gelu_tanh", tied_head=False,
)


@pytest.fixture
def examplemo(monkeypatch):
  monkeypatch.setitem(FAMILIES, "examplemo", EXAMPLEMO)


@pytest.fixture(scope="module")
def params():
  variables = nn.unbox(init_variables(CFG, jax.random.key(0)))
  rng = np.random.default_rng(0)  # norms are random, too.
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variables["params"])


def _same(got, want):
  want = flatten(want)
  assert flatten(got).keys() == want.keys()
  for path, leaf in flatten(got).items():
    np.testing.assert_array_equal(leaf, want[path], err_msg=str(path))


def test_a_record_is_enough_to_write_and_read_a_folder(examplemo, params, tmp_path):
  weights.save_pretrained(tmp_path, CFG, params, family="examplemo")
  fields = json.loads((tmp_path / "config.json").read_text())
  assert fields["architectures"] == ["ExamplemoForCausalLM"]
  assert (fields["model_type"], fields["act_fn"]) == ("examplemo", "gelu_pytorch_tanh")
  assert fields["mlp_bias"] is False and "hidden_act" not in fields
  cfg, got = weights.load_pretrained(tmp_path)
  assert canonical(cfg) == canonical(CFG)
  _same(got, params)


def test_a_record_is_enough_to_read_its_config(examplemo):
  fields = to_hf(CFG, EXAMPLEMO)
  for name in ("rope_theta", "rope_parameters", "act_fn"):
    del fields[name]
  cfg = from_hf(fields)
  assert (cfg.rope.theta, cfg.activation) == (5e5, "silu")
  assert from_hf({"model_type": "examplemo_vision", "text_config": fields}) == cfg
  with pytest.raises(UserError, match="hidden_act='silu' is not a known field"):
    from_hf(fields | {"hidden_act": "silu"})
  with pytest.raises(UserError, match="cannot be exported as family 'examplemo': qk_norm=False"):
    to_hf(ModelConfig(), EXAMPLEMO)
  with pytest.raises(UserError, match="known: examplemo, examplemo_vision, gemma3"):
    from_hf({"model_type": "unknown"})


def test_a_record_is_enough_to_read_a_gguf(examplemo, params, tmp_path):
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "exmo")
  writer.add_context_length(CFG.max_length)
  writer.add_embedding_length(CFG.hidden_size)
  writer.add_block_count(CFG.num_layers)
  writer.add_feed_forward_length(CFG.mlp_size)
  writer.add_head_count(CFG.num_heads)
  writer.add_head_count_kv(CFG.num_kv_heads)
  writer.add_key_length(CFG.head_dim)
  writer.add_layer_norm_rms_eps(CFG.norm_eps)
  leaves = flatten(params)
  for spec in tensor_specs(CFG, GGUF):
    leaf = leaves[spec.path]
    w = spec.to_file(leaf if spec.repeat is None else leaf[spec.repeat])
    if re.search(r"attn_[qk]\.weight", spec.name):  # llama.cpp's `permute`.
      halves = w.reshape(-1, 2, CFG.head_dim // 2, w.shape[1])
      w = halves.swapaxes(1, 2).reshape(w.shape)
    writer.add_tensor(spec.name, np.ascontiguousarray(w))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  cfg, got = weights.load_pretrained(tmp_path / "m.gguf")
  assert (cfg.qk_norm, cfg.rope.theta, cfg.activation) == (True, 1e4, "silu")
  _same(got, params)


def test_a_config_is_written_as_the_first_family_whose_facts_it_has(examplemo, monkeypatch):
  assert family_of(CFG).model_type == "qwen3"  # declared before examplemo.
  scaled = ModelConfig(embed_scale=128**0.5)
  with pytest.raises(UserError, match="family 'llama': embed_scale"):
    to_hf(scaled)
  monkeypatch.setitem(FAMILIES, "mo", Family("mo", "MoForCausalLM", scaled_embeddings=True))
  assert to_hf(scaled)["model_type"] == "mo"
  assert to_hf(ModelConfig())["model_type"] == "llama"


# What GGUF files call tokenizers (tokenizer.ggml.model and .pre), not families.
_TOKENIZERS = {"gguf_tokenizer.py": {"llama", "qwen2"}}


def _words(source: str) -> set[str]:
  """The words of the names and strings of a module, without comments and docstrings."""
  nodes = list(ast.walk(ast.parse(source)))
  docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
  names = ("id", "attr", "arg", "name", "value")
  texts = [getattr(node, name, None) for node in nodes if id(node) not in docs for name in names]
  return {word for text in texts if isinstance(text, str) for word in re.findall(r"\w+", text)}


def test_no_other_module_names_a_family():
  names = set()
  for family in FAMILIES.values():
    names |= {family.model_type, family.architecture, family.multimodal}
    if family.gguf:
      names |= {family.gguf.architecture, family.gguf.raw_spaces}
  assert _words('def f(x): return x.gemma == f"is {x} llama"') & names == {"gemma", "llama"}
  modules = sorted(pathlib.Path(weights.__file__).parent.glob("*.py"))
  found = {path.name: _words(path.read_text()) & names for path in modules}
  assert names - {None} <= found.pop("families.py")
  found = {name: words - _TOKENIZERS.get(name, set()) for name, words in found.items()}
  assert not {name: words for name, words in found.items() if words}
