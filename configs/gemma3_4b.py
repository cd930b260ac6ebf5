"""Gemma 3 4B, text only.

python -m dpr_jax.main --config=configs/gemma3_4b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

import ml_collections

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds on a random model and built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/gemma-3-4b-pt"
  # What the weights have; for planning, and for those who start from none.
  shape = config.model.shape
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.num_layers = 262_208, 2560, 10_240, 34
  shape.num_heads, shape.num_kv_heads, shape.head_dim = 8, 4, 256
  shape.max_length, shape.norm_eps, shape.embed_scale = 131_072, 1e-6, shape.hidden_size**0.5
  shape.activation, shape.norm_unit_offset, shape.sandwich_norm = "gelu_tanh", True, True
  shape.qk_norm = True
  shape.layer_pattern, shape.window = ("local",) * 5 + ("global",), 1024
  shape.local_rope = ml_collections.ConfigDict({"theta": 10_000.0})
  shape.rope.theta = 1_000_000.0
  shape.rope.scaling, shape.rope.factor = "linear", 8.0

  config.model.logits_budget = 1.0
  config.data.row_length, config.data.prompt_length = 2048, 1024
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = 512

  config.sft.steps, config.sft.batch_size = 1000, 64
  config.sft.optimizer.learning_rate = 1e-5
  config.dpr.steps, config.dpr.batch_size = 200, 64
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 512
  config.dpr.optimizer.learning_rate = 1e-6

  if arg == "debug":
    return shrink(config)
  if arg:
    raise UserError(f"configs/gemma3_4b.py takes '' or 'debug', not {arg!r}")
  return config
