"""Published shapes of decoders, for planning and for those who start from random weights; and what
the configs of 1 to 8 billion parameters share.
"""

import ml_collections

from dpr_jax.config import Config, debug_config, default_config
from dpr_jax.errors import UserError

LLAMA3 = dict(
    vocab_size=128_256, num_heads=32, num_kv_heads=8, max_length=131_072, norm_eps=1e-5,
    rope=dict(theta=500_000.0, scaling="llama3"),
)
LLAMA32_1B = LLAMA3 | dict(
    hidden_size=2048, mlp_size=8192, num_layers=16, head_dim=64, tied_head=True,
    rope=LLAMA3["rope"] | dict(factor=32.0),
)
LLAMA31_8B = LLAMA3 | dict(
    hidden_size=4096, mlp_size=14_336, num_layers=32, head_dim=128, tied_head=False,
    rope=LLAMA3["rope"] | dict(factor=8.0),
)
MISTRAL_7B = dict(
    vocab_size=32_000, hidden_size=4096, mlp_size=14_336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_length=32_768, norm_eps=1e-5, tied_head=False,
    layer_pattern=("local",), window=4096,
)
QWEN25_7B = dict(
    vocab_size=152_064, hidden_size=3584, mlp_size=18_944, num_layers=28, num_heads=28,
    num_kv_heads=4, head_dim=128, max_length=131_072, norm_eps=1e-6, tied_head=False,
    qkv_bias=True, rope=dict(theta=1_000_000.0),
)
GEMMA3 = dict(
    head_dim=256, norm_eps=1e-6, activation="gelu_tanh", norm_unit_offset=True, sandwich_norm=True,
    qk_norm=True, layer_pattern=("local",) * 5 + ("global",),
    local_rope=ml_collections.ConfigDict({"theta": 10_000.0}), rope=dict(theta=1_000_000.0),
)
GEMMA3_270M = GEMMA3 | dict(
    vocab_size=262_144, hidden_size=640, mlp_size=2048, num_layers=18, num_heads=4, num_kv_heads=1,
    max_length=32_768, window=512, embed_scale=640**0.5,
)
GEMMA3_4B = GEMMA3 | dict(
    vocab_size=262_208, hidden_size=2560, mlp_size=10_240, num_layers=34, num_heads=8,
    num_kv_heads=4, max_length=131_072, window=1024, embed_scale=2560**0.5,
    rope=GEMMA3["rope"] | dict(scaling="linear", factor=8.0),
)
SMOLLM2_135M = dict(
    vocab_size=49_152, hidden_size=576, mlp_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_length=8192, norm_eps=1e-5, rope=dict(theta=100_000.0),
)


def set_shape(config: Config, fields: dict) -> None:
  """Puts a shape into config.model.shape."""
  shape = config.model.shape
  for name, value in fields.items():
    if name == "rope":
      shape.rope.update(value)
    else:
      setattr(shape, name, value)


def large(pretrained: str, shape: dict, learning_rate: float = 1e-5) -> Config:
  """What the configs of 1 to 8 billion parameters share."""
  config = default_config()
  config.model.pretrained = pretrained
  set_shape(config, shape)
  config.model.logits_budget = 1.0
  config.data.row_length, config.data.prompt_length = 2048, 1024
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = 512

  config.sft.steps, config.sft.batch_size = 1000, 64
  config.sft.optimizer.learning_rate = learning_rate
  config.budget.steps, config.budget.batch_size = 200, 64
  config.budget.max_new_tokens = config.eval.max_new_tokens = 512
  config.budget.optimizer.learning_rate = learning_rate / 10
  return config


def debugged(config: Config, arg: str, file: str) -> Config:
  """The config, or with "debug" a short run of a tiny random model on the built-in tasks."""
  if arg not in ("", "debug"):
    raise UserError(f"{file} takes '' or 'debug', not {arg!r}")
  return debug_config(config) if arg else config
