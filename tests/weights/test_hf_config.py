"""Conversions between config.json and ModelConfig."""

import copy
import dataclasses
import math

import pytest

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig, Rope
from dpr_jax.models.config import COMPUTATION
from dpr_jax.weights import hf_config
from dpr_jax.weights.families import FAMILIES
from dpr_jax.weights.hf_config import canonical, family_of, from_hf, to_hf

# As published by the authors of the models.
_LLAMA31_ROPE = {
  "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192, "rope_type": "llama3",
}
PUBLISHED = {
  "Llama-3.1-8B": {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": _LLAMA31_ROPE,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
  },
  "SmolLM2-135M-Instruct": {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
  },
  "Qwen2.5-7B": {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
  },
  "Qwen3-0.6B": {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
  },
  "Mistral-7B-v0.1": {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
  },
  "gemma-3-270m": {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
    "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
  },
  "gemma-3-1b-it": {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "use_cache": True, "vocab_size": 262144,
  },
  "gemma-3-4b-it": {  # Multimodal; the text part relies on the defaults of its class.
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
    "text_config": {
      "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
      "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
  },
}
# Numbers of parameters, counted by transformers on the published files (text part).
NUM_PARAMS = {
  "Llama-3.1-8B": 8_030_261_248, "SmolLM2-135M-Instruct": 134_515_008,
  "Qwen2.5-7B": 7_615_616_512, "Qwen3-0.6B": 596_049_920, "Mistral-7B-v0.1": 7_241_732_096,
  "gemma-3-270m": 268_098_176, "gemma-3-1b-it": 999_885_952, "gemma-3-4b-it": 3_880_263_168,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_size(name):
  assert from_hf(PUBLISHED[name]).num_params == NUM_PARAMS[name]


def test_fields_of_published_configs():
  llama = from_hf(PUBLISHED["Llama-3.1-8B"])
  assert llama.rope == Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
  assert (llama.head_dim, llama.tied_head, llama.layer_pattern) == (128, False, ("global",))
  mistral = from_hf(PUBLISHED["Mistral-7B-v0.1"])
  assert (mistral.layer_pattern, mistral.window) == (("local",), 4096)
  qwen = from_hf(PUBLISHED["Qwen2.5-7B"])
  assert (qwen.qkv_bias, qwen.layer_pattern, qwen.window) == (True, ("global",), 0)
  assert from_hf(PUBLISHED["Qwen3-0.6B"]).qk_norm
  gemma = from_hf(PUBLISHED["gemma-3-4b-it"])
  assert gemma.groups == ((("local",) * 5 + ("global",), 5), (("local",) * 4, 1))
  assert gemma.rope == Rope(1_000_000.0, "linear", 8.0) and gemma.local_rope == Rope(10_000.0)
  assert (gemma.num_heads, gemma.num_kv_heads, gemma.head_dim) == (8, 4, 256)
  assert (gemma.window, gemma.query_scale, gemma.embed_scale) == (1024, 0.0, math.sqrt(2560))
  assert gemma.tied_head and gemma.activation == "gelu_tanh" and gemma.norm_unit_offset
  small = from_hf(PUBLISHED["gemma-3-270m"])
  assert small.layer_pattern == ("local",) * 5 + ("global",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same_from_old_and_from_exported_fields(name):
  """Published (old) fields -> ModelConfig -> our config.json: transformers agrees on both."""
  transformers = pytest.importorskip("transformers")
  fields = PUBLISHED[name]
  cfg = from_hf(fields)
  ours = to_hf(cfg)
  assert canonical(from_hf(ours)) == canonical(cfg)
  published = copy.deepcopy(fields)
  old = transformers.AutoConfig.for_model(published.pop("model_type"), **published)
  old = getattr(old, "text_config", old)
  new = copy.deepcopy(ours)
  new = transformers.AutoConfig.for_model(new.pop("model_type"), **new)
  assert new.model_type == old.model_type
  same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
          "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
          "max_position_embeddings", "rope_parameters", "sliding_window", "layer_types",
          "hidden_act", "hidden_activation", "query_pre_attn_scalar"]
  for field in same:
    a, b = (getattr(c, field, None) for c in (old, new))
    if field == "head_dim" and a is None:  # qwen2 has no such field.
      a = old.hidden_size // old.num_attention_heads
    assert a == b, field
  # And what transformers 5 writes is read as the same model.
  assert canonical(from_hf(old.to_diff_dict() | {"model_type": old.model_type})) == canonical(cfg)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(hf_config, family):
  case = {"gemma3_text": "gemma3"}.get(family, family)
  config = hf_config(case)
  cfg = from_hf(config.to_dict())
  assert family_of(cfg).model_type == family
  assert canonical(from_hf(to_hf(cfg))) == canonical(cfg)


def _small(model_type="llama", **fields):
  base = {
    "model_type": model_type, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, **({"head_dim": 8} if model_type != "llama" else {}),
  }
  return base | fields


REFUSED = [
  ("llama", {"attention_bias": True}, "attention_bias=True"),
  ("llama", {"mlp_bias": True}, "mlp_bias=True"),
  ("qwen3", {"attention_bias": True}, "attention_bias=True"),
  ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
  ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
  ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
  ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
  ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
  ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
  ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast=32"),
  ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
  ("llama", {"rope_scaling": [1]}, "rope_scaling=[1]"),
  ("qwen2", {"rope_parameters": {"full_attention": {}}}, "full_attention={}"),
  ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
  ("llama", {"num_experts_per_tok": 2}, "num_experts_per_tok=2"),
  ("llama", {"use_parallel_residual": True}, "use_parallel_residual=True"),
  ("llama", {"is_causal": False}, "is_causal=False"),
  ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
  ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
  ("llama", {"attention_multiplier": 2.0}, "attention_multiplier=2.0"),
  ("llama", {"sliding_window": 4}, "sliding_window=4"),
  ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
  ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 4}, "layer_types"),
  ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
  ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
  ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
  ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
  ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
  ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
  ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
  ("gemma3_text", {"sliding_window": None}, "window"),
  ("gemma3_text", {"sliding_window_pattern": "6"}, "sliding_window_pattern='6'"),
  ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
  ("mistral", {"sliding_window": 0}, "sliding_window=0"),
  ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1"),
  ("qwen2", {"max_window_layers": "all"}, "max_window_layers='all'"),
  ("llama", {"vocab_size": None}, "vocab_size is missing"),
  ("llama", {"hidden_size": "16"}, "hidden_size='16'"),
  ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
  ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
  ("llama", {"num_attention_heads": 2.5}, "num_attention_heads=2.5"),
  ("llama", {"rms_norm_eps": -1}, "rms_norm_eps=-1"),
  ("llama", {"num_attention_heads": 3}, "num_attention_heads=3"),
  ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
  ("llama", {"head_dim": 7}, "head_dim=7"),
  ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
]


@pytest.mark.parametrize("model_type, fields, named", REFUSED)
def test_a_field_that_is_not_implemented_is_refused_by_name(model_type, fields, named):
  from_hf(_small(model_type))  # fine without it.
  with pytest.raises(UserError) as error:
    from_hf(_small(model_type, **fields), "dir/config.json")
  assert str(error.value).startswith("dir/config.json:") and named in str(error.value)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2", "phi3", None, 3])
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type):
  with pytest.raises(UserError, match="gemma3_text, llama, mistral, qwen2, qwen3") as error:
    from_hf(_small() | {"model_type": model_type})
  assert f"model_type={model_type!r}" in str(error.value)


def test_a_multimodal_config_without_text_is_refused():
  with pytest.raises(UserError, match="text_config"):
    from_hf({"model_type": "gemma3"})


def test_neutral_values_are_accepted():
  neutral = {
    "attention_bias": False, "mlp_bias": None, "partial_rotary_factor": 1.0,
    "quantization_config": None, "attention_dropout": 0.0, "rope_scaling": {"type": "default"},
    "layer_types": ["full_attention"] * 4, "hidden_act": "silu",
    # Of no family here; off, they say nothing.
    "first_k_dense_replace": None, "use_parallel_residual": False, "logits_soft_cap": None,
  }
  assert from_hf(_small(**neutral)) == from_hf(_small())


def test_older_and_newer_rope_fields_mean_the_same():
  scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32}
  old = _small(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
  older = _small(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
  new = _small(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
  assert from_hf(old) == from_hf(older) == from_hf(new)
  assert from_hf(new).rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)
  gemma_old = _small("gemma3_text", rope_theta=2e6, rope_local_base_freq=3e4, sliding_window=4,
                     rope_scaling={"rope_type": "linear", "factor": 8.0})
  gemma_new = _small("gemma3_text", sliding_window=4, rope_parameters={
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
  }, sliding_window_pattern=2)
  assert from_hf(gemma_old).local_rope == from_hf(gemma_new).local_rope == Rope(3e4)
  assert from_hf(gemma_new).rope == Rope(2e6, "linear", 8.0)
  assert from_hf(gemma_new).layer_pattern == ("local", "global")
  # Four layers of a pattern of six are all local.
  assert from_hf(gemma_old).layer_pattern == ("local",)


@pytest.mark.parametrize(
  "fields, named",
  [
    ({"embed_scale": 3.0}, "embed_scale"),
    ({"norm_unit_offset": True}, "norm_unit_offset"),
    ({"query_scale": 0.3}, "query_scale"),
    ({"layer_pattern": ("local", "global"), "window": 8}, "layer_pattern"),
    ({"sandwich_norm": True}, "norm_unit_offset"),
    ({"qk_norm": True, "qkv_bias": True}, "qkv_bias"),
    ({"layer_pattern": ("local",), "window": 8, "local_rope": Rope(5.0)}, "local_rope"),
  ],
)
def test_a_function_of_no_family_is_not_exported(fields, named):
  with pytest.raises(UserError, match="cannot be exported") as error:
    to_hf(ModelConfig(**fields))
  assert named in str(error.value)


def test_a_random_model_exports_as_llama():
  cfg = ModelConfig(dtype="bfloat16", remat="dots")
  fields = to_hf(cfg)
  assert fields["model_type"] == "llama"
  assert from_hf(fields) == dataclasses.replace(cfg, dtype="float32", remat="full")
  assert to_hf(cfg, FAMILIES["mistral"])["sliding_window"] is None
  with pytest.raises(UserError, match="qkv_bias"):
    to_hf(cfg, FAMILIES["qwen2"])
  assert hf_config.family_of(cfg).architecture == "LlamaForCausalLM"


def test_how_a_model_is_computed_does_not_matter_to_its_export():
  cfg = ModelConfig(vocab_size=64)
  how = dict(dtype="bfloat16", scan_layers=False, remat="dots", attention="xla", logits_budget=2.0)
  assert set(how) == set(COMPUTATION)
  assert to_hf(dataclasses.replace(cfg, **how)) == to_hf(cfg)
