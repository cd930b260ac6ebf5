"""The whole way in minutes on a CPU: built-in tasks, a byte-level decoder, nothing to download.

python -m dpr_jax.main --config=configs/smoke.py --workdir=runs/smoke
"""

from dpr_jax.config import default_config, shrink
from dpr_jax.errors import UserError


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds."""
  config = default_config()
  config.model.remat = "none"  # A layer is small enough to keep.
  config.sft.steps, config.dpr.steps = 480, 60
  # The longest prompt and answer of the built-in tasks.
  config.data.prompt_length = 32
  config.dpr.max_new_tokens = config.eval.max_new_tokens = 20
  if arg == "debug":
    return shrink(config)
  if arg:
    raise UserError(f"configs/smoke.py takes '' or 'debug', not {arg!r}")
  return config
