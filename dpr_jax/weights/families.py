"""Model families: what each `model_type` of a config.json means, and how llama.cpp stores it.

A family is one record of facts, and no other module knows its name: `hf_config.py` and `gguf.py`
convert to and from `ModelConfig` by the facts, `names.py` has the tensor names. A record of your
own is added as `FAMILIES["mine"] = Family("mine", "MineForCausalLM", ...)`.

Sources: the configuration classes of transformers 5, and llama.cpp's src/llama-model.cpp.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.models.config import LOCAL, ModelConfig, Rope

Fields = Mapping[str, Any]

# Fields that do not affect the function: bookkeeping, initialisation, generation defaults.
IRRELEVANT = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version transformers.js_config use_cache
    cache_implementation initializer_range bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id pretraining_tp name_or_path _name_or_path is_llama_config return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss prefix
    chunk_size_feed_forward is_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class return_dict_in_generate output_scores max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attn_implementation
    _attn_implementation _attn_implementation_autoset tie_last_hidden_states unsloth_fixed
    unsloth_version
    """.split()
)

# Fields of features that the decoder does not implement, with the values that disable them
# (null also does). Fields in none of these lists are refused as unknown.
NEUTRAL: Fields = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "auto_map": (),
}

# Flags of parts that every decoder here has: false is no feature that is off.
PARTS = frozenset("""
    causal is_causal use_causal_mask rope use_rope use_rotary use_rotary_embeddings rotary
    use_rms_norm use_norm norm gated_mlp use_glu scale_attn_weights use_attention add_final_norm
    """.split())

# Fields that every family reads, and the defaults of Llama.
COMMON = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings
    rope_theta rope_scaling rope_parameters layer_types
    """.split()
)
LLAMA_DEFAULTS: Fields = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


@dataclasses.dataclass(frozen=True)
class GGUFFacts:
  """How llama.cpp stores a family."""

  architecture: str  # value of general.architecture.
  interleaved: bool = False  # rows of q and k are interleaved for ggml's rope.
  absent: Fields = dataclasses.field(default_factory=dict)  # values of keys that a file may lack.
  fields: Callable[[Fields], Fields] = lambda f: {}  # keys -> further fields of config.json.
  # SentencePiece: prefix of architectures that keep runs of spaces and order merges by id.
  raw_spaces: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """How the config.json of one `model_type` represents a `ModelConfig`."""

  model_type: str
  architecture: str  # class name in transformers.
  gguf: GGUFFacts | None = None  # None: llama.cpp has no architecture of its own for it.
  multimodal: str | None = None  # model_type of configs whose text_config is of this family.

  # Fields of ModelConfig that have the same value in every model of the family.
  sandwich_norm: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  norm_unit_offset: bool = False
  scaled_embeddings: bool = False  # embed_scale is sqrt(hidden_size), else 1.

  # Reading. Fields other than COMMON, `activation` and the keys of `defaults` are refused.
  defaults: Fields = dataclasses.field(default_factory=dict)  # where they differ from Llama's.
  activation: str = "hidden_act"  # name of this field.
  query_scalar: str | None = None  # name of the field x, where query_scale is x ** -0.5.
  local_theta: str | None = None  # name of the rope theta of local layers, where they have one.
  is_local: Callable[[Fields, int], bool] = lambda f, i: False  # layer i; without layer_types.
  mixes_layers: bool = False  # layer_types may differ from `is_local`.

  # Writing, in addition to the fields of every family.
  constants: Fields = dataclasses.field(default_factory=dict)
  write: Callable[[ModelConfig, list[str]], Fields] = lambda cfg, types: {}  # of a canonical cfg.

  def fixed(self, hidden_size: int) -> dict[str, Any]:
    """Returns the fields of ModelConfig that the family decides, the most distinctive first."""
    names = ("sandwich_norm", "qk_norm", "qkv_bias", "norm_unit_offset")
    scale = hidden_size**0.5 if self.scaled_embeddings else 1.0
    return {**{name: getattr(self, name) for name in names}, "embed_scale": scale}

  def differences(self, cfg: ModelConfig) -> list[bool]:
    """Returns for each fact whether a canonical `cfg` differs; the smallest list fits best."""
    differs = [getattr(cfg, name) != x for name, x in self.fixed(cfg.hidden_size).items()]
    return [*differs, LOCAL in cfg.layer_pattern and "sliding_window" not in self.defaults]


def local_rope(cfg: ModelConfig) -> Rope:
  """Returns the rope of the local layers of a canonical `cfg`, or the default if it has none."""
  return cfg.rope_of(LOCAL) if cfg.window else Rope()


def _is_local_qwen(f: Fields, i: int) -> bool:
  return f["use_sliding_window"] and bool(f["sliding_window"]) and i >= f["max_window_layers"]


def _write_qwen(cfg: ModelConfig, types: list[str]) -> Fields:
  return {
      "use_sliding_window": bool(cfg.window),
      "sliding_window": cfg.window or None,
      "max_window_layers": types.index("sliding_attention") if cfg.window else cfg.num_layers,
      "layer_types": types,
  }


def _is_local_gemma(f: Fields, i: int) -> bool:
  return (i + 1) % (f["sliding_window_pattern"] or f["_sliding_window_pattern"] or 6) != 0


def _write_gemma(cfg: ModelConfig, types: list[str]) -> Fields:
  return {
      "layer_types": types,
      "sliding_window": cfg.window or 4096,
      "query_pre_attn_scalar": round((cfg.query_scale or cfg.head_dim**-0.5) ** -2),
      "rope_local_base_freq": local_rope(cfg).theta,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
  }


def _gemma_from_gguf(f: Fields) -> Fields:
  # Only the 27B model (62 layers) has a query scale that does not follow from its head_dim.
  share = f["embedding_length"] // f["attention.head_count"]
  fields = {
      "query_pre_attn_scalar": share if f["block_count"] == 62 else f["attention.key_length"],
      "sliding_window": f.get("attention.sliding_window"),
      "rope_local_base_freq": f["rope.freq_base_swa"],
  }
  pattern = f["attention.sliding_window_pattern"]
  if not isinstance(pattern, list):
    return fields | {"sliding_window_pattern": pattern}
  types = ["sliding_attention" if local else "full_attention" for local in pattern]
  return fields | {"layer_types": types}


_QWEN_DEFAULTS: Fields = {
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
# A model that fits several families is written as the first of them.
_FAMILIES = (
    Family(
        "llama", "LlamaForCausalLM", GGUFFacts("llama", interleaved=True),
        constants={"attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "mistral", "MistralForCausalLM",
        defaults={
            "sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        },
        is_local=lambda f, i: bool(f["sliding_window"]),
        write=lambda cfg, types: {"sliding_window": cfg.window or None},
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", GGUFFacts("qwen2"), qkv_bias=True,
        defaults=_QWEN_DEFAULTS, is_local=_is_local_qwen, mixes_layers=True, write=_write_qwen,
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", GGUFFacts("qwen3"), qk_norm=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128}, is_local=_is_local_qwen, mixes_layers=True,
        constants={"attention_bias": False}, write=_write_qwen,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM",
        GGUFFacts(
            "gemma3", fields=_gemma_from_gguf, raw_spaces="gemma",
            absent={
                "attention.key_length": 256, "attention.sliding_window_pattern": 6,
                "rope.freq_base": 1_000_000.0, "rope.freq_base_swa": 10_000.0,
            },
        ),
        multimodal="gemma3",
        sandwich_norm=True, qk_norm=True, norm_unit_offset=True, scaled_embeddings=True,
        defaults={
            "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072, "tie_word_embeddings": True,
            "sliding_window": 4096, "sliding_window_pattern": None,
            "_sliding_window_pattern": None, "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        },
        activation="hidden_activation", query_scalar="query_pre_attn_scalar",
        local_theta="rope_local_base_freq", is_local=_is_local_gemma, mixes_layers=True,
        constants={"attention_bias": False}, write=_write_gemma,
    ),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}


def family_named(model_type: Any, where: str = "config.json") -> Family:
  """Returns the family of a `model_type`; raises UserError with the known ones if unknown."""
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    known = {*FAMILIES, *(family.multimodal for family in FAMILIES.values())} - {None}
    raise UserError(f"{where}: model_type={model_type!r} is not implemented; known: "
                    f"{', '.join(sorted(known))}")
  return FAMILIES[model_type]
