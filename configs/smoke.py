"""The whole run in minutes on a CPU: built-in tasks, a byte-level decoder, nothing to download.

python -m dpr_jax.main --config=configs/smoke.py --workdir=runs/smoke
"""

from model_shapes import debugged

from dpr_jax.config import default_config


def get_config(arg: str = ""):
  """arg: "" or "debug", the same run in seconds."""
  config = default_config()
  config.model.remat = "none"  # A layer is small enough to keep.
  config.sft.steps, config.budget.steps = 480, 60
  # The longest prompt and answer of the built-in tasks.
  config.data.prompt_length = 32
  config.budget.max_new_tokens = config.eval.max_new_tokens = 20
  return debugged(config, arg, "configs/smoke.py")
