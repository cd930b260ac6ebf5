"""The return that weights a token: its reward-to-go, that of the whole response, or its own reward.

python -m dpr_jax.main --config=configs/sweeps/returns.py --workdir=runs/returns
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.sweep.field = "methods.dpr.returns"
  config.sweep.values = ("reward_to_go", "full_return", "per_token")
  return config
