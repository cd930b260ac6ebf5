"""Qwen2.5 7B.

python -m dpr_jax.main --config=configs/qwen25_7b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds on a random model and built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/Qwen2.5-7B"
  # What the weights have; for planning, and for those who start from none.
  shape = config.model.shape
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.num_layers = 152_064, 3584, 18_944, 28
  shape.num_heads, shape.num_kv_heads, shape.head_dim = 28, 4, 128
  shape.max_length, shape.norm_eps, shape.tied_head = 131_072, 1e-6, False
  shape.qkv_bias = True
  shape.rope.theta = 1_000_000.0

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
    raise UserError(f"configs/qwen25_7b.py takes '' or 'debug', not {arg!r}")
  return config
