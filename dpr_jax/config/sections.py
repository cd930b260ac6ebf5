"""The sections of a run's config: every field with its meaning, unit and bounds."""

import dataclasses

from dpr_jax.config.fields import setting, slot, slots
from dpr_jax.models.config import ATTENTION, ModelConfig
from dpr_jax.models.lora import LoRA


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """What is trained, and how it is computed."""

  pretrained: str = setting(
      "", "Hugging Face folder or .gguf; '' starts from random weights of `shape`"
  )
  keep_layers: int = setting(
      0, "start from this many layers of the pretrained weights, evenly spaced; 0 keeps all", low=0
  )
  dtype: str = setting(
      "auto", "of activations and matmuls; auto: bfloat16 on TPU and GPU, float32 on CPU",
      choices=("auto", "float32", "bfloat16"),
  )
  remat: str = setting(
      "full", "what the backward pass recomputes", choices=("none", "dots", "full"), resumable=True
  )
  attention: str = setting(
      "auto", "kernel over whole rows; auto: cuDNN on GPU and splash on TPU where they take the "
      "dtype and shape, else XLA", choices=ATTENTION, resumable=True,
  )
  logits_budget: float = setting(
      0.25, "GiB per device for the logits that live at a time in a loss or in scoring", low=0.001,
      resumable=True,
  )
  lora: LoRA = setting(LoRA(), "adapters to train instead of all parameters")
  shape: ModelConfig = setting(
      ModelConfig(vocab_size=0), "of a model that starts from random weights; a vocab_size of 0 is "
      "that of the byte-level tokenizer"
  )


@dataclasses.dataclass(frozen=True)
class DataSection:
  """Demonstrations: the built-in tasks, or a file."""

  demos: str = setting("", "JSONL, JSON or Parquet; '' makes demonstrations of the built-in tasks")
  format: str = setting(
      "auto", "of the file",
      choices=("auto", "messages", "prompt_response", "alpaca", "sharegpt", "gsm8k"),
  )
  on_empty: str = setting(
      "error", "what to do with a demonstration whose response is empty", choices=("error", "drop")
  )
  max_demos: int = setting(0, "use only this many of the file; 0 uses all", low=0)
  holdout: int = setting(256, "demonstrations kept for evaluation, disjoint in prompts", low=1)
  template: str = setting("", "a .jinja chat template; '' uses the tokenizer's own")
  train_on: str = setting("all", "assistant turns that are trained", choices=("all", "last"))
  row_length: int = setting(64, "tokens per packed row", low=2)
  overlong: str = setting(
      "drop", "a demonstration longer than a row", choices=("drop", "truncate", "error")
  )
  prompt_length: int = setting(48, "tokens; the longest prompt that is continued", low=1)
  overlong_prompt: str = setting("error", "a longer prompt", choices=("error", "drop"))
  tasks: tuple[str, ...] = setting((), "built-in tasks, names of data/tasks.py; () takes all")
  num_demos: int = setting(20_000, "training demonstrations of the built-in tasks", low=1)
  corrupt: float = setting(
      0.0, "share of the built-in tasks' training demonstrations with a wrong answer", low=0, high=1
  )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a schedule over the steps of what it trains."""

  learning_rate: float = setting(1e-3, "peak", low=0)
  schedule: str = setting(
      "cosine", "after the warm-up", choices=("constant", "cosine", "linear")
  )
  final_fraction: float = setting(0.1, "of the peak, at the last step", low=0, high=1)
  warmup_steps: int = setting(20, "steps of linear warm-up", low=0)
  weight_decay: float = setting(0.0, "not applied to norms and biases", low=0)
  b1: float = setting(0.9, "decay of the first moment", low=0, high=0.99999)
  b2: float = setting(0.95, "decay of the second moment", low=0, high=0.999999)
  eps: float = setting(1e-8, "added to the root of the second moment", low=0)
  max_grad_norm: float = setting(1.0, "global norm to clip to; 0 does not clip", low=0)


OptimizerChanges = dataclasses.make_dataclass(
    "OptimizerChanges",
    [
        (f.name, f.type | None, dataclasses.field(default=None, metadata=f.metadata))
        for f in dataclasses.fields(OptimizerConfig)
    ],
    frozen=True,
    namespace={"__doc__": "Fields of an optimizer that differ from the shared one; None: as there.",
               "__module__": __name__},
)


def check_accumulation(batch_size: int, accumulation: int) -> None:
  """Raises ValueError where micro-batches would differ in size."""
  if batch_size % accumulation:
    raise ValueError(
        f"batch_size={batch_size} is not a multiple of accumulation={accumulation}"
    )


@dataclasses.dataclass(frozen=True)
class SFTSection:
  """Supervised fine-tuning on the demonstrations, where everything else starts."""

  steps: int = setting(600, "updates", low=1)
  batch_size: int = setting(32, "packed rows per step", low=1)
  accumulation: int = setting(1, "micro-batches per step", low=1)
  milestones: tuple[float, ...] = setting(
      (0.1, 0.25, 0.5, 0.75), "fractions of the steps whose checkpoints are kept"
  )
  optimizer: OptimizerConfig = setting(OptimizerConfig())

  def __post_init__(self):
    check_accumulation(self.batch_size, self.accumulation)


@dataclasses.dataclass(frozen=True)
class Budget:
  """What every method trains with, unless it says otherwise: so comparisons are fair."""

  steps: int = setting(100, "updates after SFT", low=1)
  batch_size: int = setting(64, "rows per step: rollouts, demonstrations, sides of pairs", low=1)
  accumulation: int = setting(1, "micro-batches per step", low=1)
  max_new_tokens: int = setting(
      24, "response tokens per row, sampled, or kept of a demonstration", low=1
  )
  optimizer: OptimizerConfig = setting(OptimizerConfig(learning_rate=1e-4, warmup_steps=5))

  def __post_init__(self):
    check_accumulation(self.batch_size, self.accumulation)


@dataclasses.dataclass(frozen=True)
class EvalSection:
  """Every system on the held-out prompts."""

  num_prompts: int = setting(256, "held-out prompts; 0 takes all", low=0)
  skip_prompts: int = setting(
      0, "held-out prompts passed over first: choose settings on others than are reported", low=0
  )
  batch_size: int = setting(64, "responses decoded, or scored, at a time", low=1)
  max_new_tokens: int = setting(24, "tokens per response", low=1)
  benchmark: object = slot(
      "dpr_jax.evaluation.benchmarks", None,
      "judges the responses; None: what fits the demonstrations",
  )
  metrics: dict = slots("dpr_jax.evaluation.metrics", "measured of every system")
  frontier_samples: int = setting(
      8, "responses per prompt and temperature for the frontier of accuracy and coverage; 0: none",
      low=0,
  )
  frontier_prompts: int = setting(128, "of the held-out prompts; 0 takes all", low=0)
  temperatures: tuple[float, ...] = setting(
      (1.0, 0.7, 0.5, 0.35), "of the frontier, beside greedy decoding", above=0
  )
  expert: str = setting(
      "", "the model that the demonstrations were sampled from at temperature 1, with the run's "
      "vocabulary: a Hugging Face folder, .gguf or stage of a workdir; '' measures no KL to it"
  )
  heatmaps: int = setting(
      8, "demonstrations and rollouts shown token by token in the report", low=0
  )
  corrupted_tokens: int = setting(
      256, "held-out demonstrations of which one token is made wrong: does the reward find it? 0: "
      "none", low=0
  )
  reference_prompts: int = setting(
      64, "training prompts on which references are measured; 0 measures nothing", low=0
  )


@dataclasses.dataclass(frozen=True)
class SweepSection:
  """Several runs that differ in one field, with what they share done once."""

  field: str = setting("", "dotted, such as methods.dpr.beta; '' runs the config once")
  values: tuple[str, ...] = setting((), "as written on the command line; one point each")

  def __post_init__(self):
    if self.values and not self.field:
      raise ValueError("values are given without field, such as methods.dpr.beta")


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """Device mesh; one axis may be -1, the rest of the devices."""

  data: int = setting(1, "replicas: parameters are copied, the batch is split", low=-1)
  fsdp: int = setting(-1, "the batch and the parameters are split", low=-1)
  tensor: int = setting(1, "heads, MLP columns and vocabulary are split", low=-1)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  """When the state of a stage is saved."""

  every: int = setting(200, "steps between checkpoints; the last step is always saved", low=1)
  keep: int = setting(1, "latest checkpoints kept, beside the milestones", low=1)


@dataclasses.dataclass(frozen=True)
class LogSection:
  """What a run tells while it goes on."""

  every: int = setting(1, "steps between lines of metrics.jsonl", low=1)
  progress: bool = setting(True, "a progress bar on stderr, from process 0")
  tensorboard: bool = setting(True, "also write TensorBoard files")
  profile_steps: str = setting("", "FIRST:LAST, steps of each trained stage to trace; '': none")

  def __post_init__(self):
    from dpr_jax.training.profiling import parse_steps

    parse_steps(self.profile_steps)
