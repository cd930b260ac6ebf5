"""Llama 3.2 1B: what one GPU or a small slice trains whole.

python -m dpr_jax.main --config=configs/llama32_1b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import LLAMA32_1B, debugged, large


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = large("weights/Llama-3.2-1B", LLAMA32_1B, learning_rate=2e-5)
  config.sft.accumulation = config.budget.accumulation = 8
  return debugged(config, arg, "configs/llama32_1b.py")
