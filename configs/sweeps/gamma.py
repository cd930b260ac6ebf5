"""The discount, from rewards of the token alone to the whole rest of the response.

python -m dpr_jax.main --config=configs/sweeps/gamma.py --workdir=runs/gamma
"""

from dpr_jax.config_args import other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  # Settings are not chosen on the prompts that are reported.
  config.eval.skip_prompts = config.data.holdout
  config.data.holdout *= 2
  config.baseline.names = ()  # Each would be trained at every point.
  config.dpr.returns, config.dpr.transforms = "reward_to_go", ()
  config.sweep.field = "dpr.gamma"
  config.sweep.values = ("0", "0.9", "0.99", "1")
  return config
