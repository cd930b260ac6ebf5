"""How early the reference is: from 10% to 90% of the SFT run, all milestones of one run.

python -m dpr_jax.main --config=configs/sweeps/reference_fraction.py --workdir=runs/reference
"""

from dpr_jax.config.files import evaluate_on_others, other_config


def get_config(arg: str = ""):
  """arg: "" or "debug", as of configs/smoke.py, on which the sweep is."""
  config = other_config(__file__, "../smoke.py", arg)
  evaluate_on_others(config)
  config.sft.milestones = tuple(i / 10 for i in range(1, 10))
  config.sweep.field = "reference.fraction"
  config.sweep.values = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
  return config
