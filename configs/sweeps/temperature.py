"""The temperature of the behavior; any other than 1 biases the gradient.

python -m dpr_jax.main --config=configs/sweeps/temperature.py --workdir=runs/temperature
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.sweep.field = "methods.dpr.temperature"
  config.sweep.values = ("0.5", "0.7", "1", "1.3")
  return config
