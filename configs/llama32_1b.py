"""Llama 3.2 1B: what one GPU or a small slice trains whole.

python -m dpr_jax.main --config=configs/llama32_1b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds on a random model and built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/Llama-3.2-1B"
  # What the weights have; for planning, and for those who start from none.
  shape = config.model.shape
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.num_layers = 128_256, 2048, 8192, 16
  shape.num_heads, shape.num_kv_heads, shape.head_dim = 32, 8, 64
  shape.max_length, shape.norm_eps, shape.tied_head = 131_072, 1e-5, True
  shape.rope.theta, shape.rope.scaling, shape.rope.factor = 500_000.0, "llama3", 32.0

  config.model.logits_budget = 1.0
  config.data.row_length, config.data.prompt_length = 2048, 1024
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = 512

  config.sft.steps, config.sft.batch_size, config.sft.accumulation = 1000, 64, 8
  config.sft.optimizer.learning_rate = 2e-5
  config.dpr.steps, config.dpr.batch_size, config.dpr.accumulation = 200, 64, 8
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 512
  config.dpr.optimizer.learning_rate = 2e-6

  if arg == "debug":
    return shrink(config)
  if arg:
    raise UserError(f"configs/llama32_1b.py takes '' or 'debug', not {arg!r}")
  return config
