"""Model families: the meaning of each `model_type` in a config.json.

There is one record per family, and lists of the config.json fields that may be ignored.
`hf_config.py` converts between config.json and `ModelConfig`; `names.py` has the tensor names.

Source of field meanings and defaults: the configuration classes of transformers 5.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dpr_jax.errors import UserError
from dpr_jax.models.config import GLOBAL, LOCAL

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

# Fields that every family reads.
COMMON = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings
    rope_theta rope_scaling rope_parameters layer_types
    """.split()
)

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS = {"full_attention": GLOBAL, "sliding_attention": LOCAL}
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}


@dataclasses.dataclass(frozen=True)
class Family:
  """How the config.json of one `model_type` represents a `ModelConfig`."""

  model_type: str
  architecture: str  # class name in transformers.
  layer_types: Callable[[Fields], tuple[list[str], int]]  # -> default types, window (0: none).
  fields: frozenset[str]  # fields that are read in addition to COMMON.
  defaults: Fields  # of absent fields, if they differ from Llama's.
  activation: str = "hidden_act"
  qkv_bias: bool = False
  qk_norm: bool = False
  gemma: bool = False  # sandwich norms, (1 + w), scaled embeddings, two ropes.


def _llama_layers(f: Fields) -> tuple[list[str], int]:
  return ["full_attention"] * f["num_hidden_layers"], 0


def _mistral_layers(f: Fields) -> tuple[list[str], int]:
  window = f["sliding_window"] or 0
  return ["sliding_attention" if window else "full_attention"] * f["num_hidden_layers"], window


def _qwen_layers(f: Fields) -> tuple[list[str], int]:
  window = (f["sliding_window"] or 0) if f["use_sliding_window"] else 0
  local = [bool(window) and i >= f["max_window_layers"] for i in range(f["num_hidden_layers"])]
  return ["sliding_attention" if x else "full_attention" for x in local], window


def _gemma_layers(f: Fields) -> tuple[list[str], int]:
  period = f.get("sliding_window_pattern") or f.get("_sliding_window_pattern") or 6
  local = [i % period != 0 for i in range(1, f["num_hidden_layers"] + 1)]
  return ["sliding_attention" if x else "full_attention" for x in local], f["sliding_window"] or 0


_QWEN_DEFAULTS = {
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
_QWEN_FIELDS = frozenset(
    "hidden_act sliding_window use_sliding_window max_window_layers".split()
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _llama_layers, frozenset({"hidden_act"}), {}),
        Family(
            "mistral",
            "MistralForCausalLM",
            _mistral_layers,
            frozenset({"hidden_act", "sliding_window"}),
            {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", _qwen_layers, _QWEN_FIELDS, _QWEN_DEFAULTS, qkv_bias=True
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _qwen_layers,
            _QWEN_FIELDS,
            {**_QWEN_DEFAULTS, "head_dim": 128},
            qk_norm=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _gemma_layers,
            frozenset(
                """
                hidden_activation sliding_window sliding_window_pattern _sliding_window_pattern
                query_pre_attn_scalar rope_local_base_freq
                """.split()
            ),
            {
                "vocab_size": 262208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": True,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
            },
            activation="hidden_activation",
            qk_norm=True,
            gemma=True,
        ),
    )
}
LLAMA_DEFAULTS: Fields = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


def family_named(model_type: Any, where: str = "config.json") -> Family:
  """Returns the family of a `model_type`; raises UserError with the known ones if unknown."""
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise UserError(
        f"{where}: model_type={model_type!r} is not implemented; known: gemma3, "
        f"{', '.join(sorted(FAMILIES))}"
    )
  return FAMILIES[model_type]
