"""The discount, from rewards of the token alone to the whole rest of the response.

python -m dpr_jax.main --config=configs/sweeps/gamma.py --workdir=runs/gamma
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.methods.dpr.returns = "reward_to_go"
  config.sweep.field = "methods.dpr.gamma"
  config.sweep.values = ("0", "0.9", "0.99", "1")
  return config
