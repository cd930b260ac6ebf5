"""The reward with the reference and without: log pi_sft alone, and the endogenous one.

python -m dpr_jax.main --config=configs/sweeps/reward.py --workdir=runs/reward
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  # The endogenous reward of one token means nothing.
  config.methods.dpr.returns = "reward_to_go"
  config.sweep.field = "methods.dpr.reward"
  config.sweep.values = ("baseline_relative", "log_likelihood", "endogenous")
  return config
