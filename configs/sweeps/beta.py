"""The weight of the KL to SFT; 1 / beta is the strength of all extrapolation.

python -m dpr_jax.main --config=configs/sweeps/beta.py --workdir=runs/beta
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.sweep.field = "methods.dpr.beta"
  config.sweep.values = ("0.1", "0.3", "1", "3", "10")
  return config
