"""The whole run in minutes on a CPU: built-in tasks, a byte-level decoder, nothing to download.

python -m dpr_jax.main --config=configs/smoke.py --workdir=runs/smoke

One demonstration in five is wrong and the reference is early: a setting in which the reward pays,
most of all where it chooses demonstrations (`cleaned_sft`). Baselines that need no training, and
continued SFT, stand beside it and DPR. docs/findings.md has other settings.
"""

from model_shapes import debugged

from dpr_jax.config import default_config
from dpr_jax.references.midrun import Midrun


def get_config(arg: str = ""):
  """arg: "" or "debug", the same run with a tiny model and without cleaned SFT."""
  config = default_config()
  config.model.remat = "none"  # A layer is small enough to keep.
  shape = config.model.shape
  shape.mlp_size, shape.num_layers = 256, 2
  # Three tasks with one right answer, three with many.
  config.data.tasks = ("sort", "reverse", "count", "shuffle", "word", "range")
  config.data.corrupt = 0.2
  config.data.prompt_length = 24  # The longest prompt of these tasks has 22 tokens,
  config.budget.max_new_tokens = config.eval.max_new_tokens = 12  # and the longest answer 7.
  config.sft.steps = 400
  config.sft.optimizer.learning_rate = 3e-3
  config.reference = Midrun(fraction=0.1)
  config.budget.steps = 60
  config.budget.optimizer.learning_rate = 7e-4
  config.compare = (
      "low_temperature", "contrastive", "weight_extrapolation", "continued_sft", "cleaned_sft",
      "dpr",
  )
  config.eval.batch_size = 128
  if arg:  # Most of its time is compilation, and three more stages would double it.
    config.compare = tuple(name for name in config.compare if name != "cleaned_sft")
  return debugged(config, arg, "configs/smoke.py")
