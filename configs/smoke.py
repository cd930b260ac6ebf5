"""The whole way in minutes on a CPU: built-in tasks, a byte-level decoder, nothing to download.

python -m dpr_jax.main --config=configs/smoke.py --workdir=runs/smoke
"""

from dpr_jax.config import default_config


def get_config(arg: str = ""):
  """arg: "" or "debug", the same way in seconds."""
  config = default_config()
  config.model.remat = "none"  # A layer is small enough to keep.
  if arg == "debug":
    shape = config.model.shape
    shape.hidden_size, shape.mlp_size, shape.num_layers = 32, 64, 2
    shape.num_heads = shape.num_kv_heads = 2
    shape.head_dim = 16
    config.data.num_demos, config.data.holdout = 400, 32
    config.sft.steps, config.sft.batch_size = 20, 8
    config.dpr.steps, config.dpr.batch_size = 4, 16
    config.eval.num_prompts, config.eval.batch_size, config.eval.heatmaps = 32, 16, 2
    config.checkpoint.every = 10
  elif arg:
    raise ValueError(f"configs/smoke.py takes '' or 'debug', not {arg!r}")
  return config
