"""The reward with the reference and without: log pi_sft alone, and the endogenous one.

python -m dpr_jax.main --config=configs/sweeps/reward.py --workdir=runs/reward
"""

from dpr_jax.config_args import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.baseline.names = ()  # Each would be trained at every point.
  # The endogenous reward of one token means nothing, and has no expectation to be centred by.
  config.dpr.returns, config.dpr.transforms = "reward_to_go", ()
  config.sweep.field = "dpr.reward"
  config.sweep.values = ("baseline_relative", "log_likelihood", "endogenous")
  return config
