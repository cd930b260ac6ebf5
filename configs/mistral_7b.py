"""Mistral 7B v0.1, with its sliding window.

python -m dpr_jax.main --config=configs/mistral_7b.py --workdir=DIR \
    --config.model.pretrained=FOLDER --config.data.demos=FILE
"""

from model_shapes import MISTRAL_7B, debugged, large


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = large("weights/Mistral-7B-v0.1", MISTRAL_7B)
  return debugged(config, arg, "configs/mistral_7b.py")
