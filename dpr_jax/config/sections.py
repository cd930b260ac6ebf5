"""The sections of a run's config: every field with its meaning, unit and bounds."""

import dataclasses
import re

from dpr_jax.config.fields import declared, setting, slot, slots
from dpr_jax.models.config import ATTENTION, ModelConfig
from dpr_jax.models.lora import LoRA

BENCHMARKS = "dpr_jax.evaluation.benchmarks"


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """What is trained, and how it is computed."""

  pretrained: str = setting(
      "", "Hugging Face folder or .gguf file; '' starts from random weights of `shape`"
  )
  keep_layers: int = setting(
      0, "number of layers to keep of the pretrained weights, evenly spaced; 0 keeps all", low=0
  )
  dtype: str = setting(
      "auto", "dtype of activations and matmuls; auto: bfloat16 on TPU and GPU, float32 on CPU",
      choices=("auto", "float32", "bfloat16"),
  )
  remat: str = setting(
      "full", "what the backward pass recomputes", choices=("none", "dots", "full"), resumable=True
  )
  attention: str = setting(
      "auto", "attention kernel over whole rows; auto: cuDNN on GPU and splash on TPU where they "
      "support the dtype and shape, else XLA", choices=ATTENTION, resumable=True,
  )
  logits_budget: float = setting(
      0.25, "GiB per device for the logits that a loss or scoring holds at a time", low=0.001,
      resumable=True,
  )
  lora: LoRA = setting(LoRA(), "adapters that are trained instead of all parameters")
  shape: ModelConfig = setting(
      ModelConfig(vocab_size=0), "shape of a model that starts from random weights; a vocab_size "
      "of 0 takes that of the byte-level tokenizer"
  )


@dataclasses.dataclass(frozen=True)
class DataSection:
  """Demonstrations: the built-in tasks, or a file."""

  demos: str = setting(
      "", "JSONL, JSON, Parquet or Arrow, gzipped or not, or a folder of such files; '' makes "
      "demonstrations of the built-in tasks"
  )
  format: str = setting(
      "auto", "format of the file",
      choices=("auto", "messages", "prompt_response", "alpaca", "sharegpt", "gsm8k",
               "question_answer"),
  )
  on_empty: str = setting(
      "error", "what to do with a demonstration whose response is empty", choices=("error", "drop")
  )
  on_disorder: str = setting(
      "error", "what to do with a dialogue that begins with the assistant, ends with the user, or "
      "has two turns of one role in a row", choices=("error", "drop"),
  )
  extra_fields: tuple[str, ...] = setting(
      (), "unknown fields of the file that change nothing and are carried along; '*' for all"
  )
  max_demos: int = setting(0, "number of demonstrations of the file to use; 0 uses all", low=0)
  holdout: int = setting(256, "demonstrations kept for evaluation, disjoint in prompts", low=1)
  template: str = setting("", "a .jinja chat template; '' uses the tokenizer's own")
  train_on: str = setting("all", "assistant turns that are trained on", choices=("all", "last"))
  row_length: int = setting(64, "tokens per packed row", low=2)
  overlong: str = setting(
      "drop", "what to do with a demonstration longer than a row",
      choices=("drop", "truncate", "error"),
  )
  prompt_length: int = setting(48, "tokens of the longest prompt that is continued", low=1)
  overlong_prompt: str = setting(
      "error", "what to do with a longer prompt", choices=("error", "drop")
  )
  tasks: tuple[str, ...] = setting(
      (), "names of built-in tasks (data/tasks.py, data/long_tasks.py), used in turn; upper:0.02 "
      "gives a task a share of the demonstrations, the others the rest; () takes all short ones"
  )
  num_demos: int = setting(20_000, "number of demonstrations of the built-in tasks", low=1)
  corrupt: float = setting(
      0.0, "share of these demonstrations that get a wrong answer", low=0, high=1
  )
  corruption: str = setting(
      "answer", "how they are wrong: see docs/data.md; `repeated` ones are right, copies of few",
      choices=declared("dpr_jax.data.wrong_answers", "KINDS"),
  )
  minority: float = setting(
      0.0, "share of these demonstrations, others than the wrong ones, that answer rightly in a "
      "rare style: in brackets", low=0, high=1
  )

  def __post_init__(self):
    if self.corrupt + self.minority > 1:
      raise ValueError(f"corrupt={self.corrupt} and minority={self.minority} are shares of "
                       "different demonstrations and must not exceed 1 together")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a schedule over the steps of what it trains."""

  learning_rate: float = setting(1e-3, "peak learning rate", low=0)
  schedule: str = setting(
      "cosine", "decay after the warm-up", choices=("constant", "cosine", "linear")
  )
  final_fraction: float = setting(
      0.1, "learning rate at the last step, as a fraction of the peak", low=0, high=1
  )
  warmup_steps: int = setting(20, "steps of the linear warm-up", low=0)
  weight_decay: float = setting(0.0, "weight decay; not applied to norms and biases", low=0)
  b1: float = setting(0.9, "decay rate of the first moment", low=0, high=0.99999)
  b2: float = setting(0.95, "decay rate of the second moment", low=0, high=0.999999)
  eps: float = setting(1e-8, "added to the root of the second moment", low=0)
  max_grad_norm: float = setting(1.0, "global norm that gradients are clipped to; 0: none", low=0)


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
    raise ValueError(f"batch_size={batch_size} is not a multiple of accumulation={accumulation}")


@dataclasses.dataclass(frozen=True)
class SFTSection:
  """Supervised fine-tuning on the demonstrations, from which every method starts."""

  steps: int = setting(600, "optimizer updates", low=1)
  batch_size: int = setting(32, "packed rows per step", low=1)
  accumulation: int = setting(1, "micro-batches per step", low=1)
  milestones: tuple[float, ...] = setting(
      (0.1, 0.25, 0.5, 0.75), "fractions of the steps at which a checkpoint is kept"
  )
  optimizer: OptimizerConfig = setting(OptimizerConfig())

  def __post_init__(self):
    check_accumulation(self.batch_size, self.accumulation)
    for fraction, step in self.milestone_steps().items():
      if not 0 < fraction <= 1 or step < 1:
        raise ValueError(f"milestones: {fraction} of {self.steps} steps is step {step}; fractions "
                         "lie in (0, 1] and reach step 1 at least")

  def milestone_steps(self) -> dict[float, int]:
    """Fraction -> step at which its checkpoint is kept, ascending. The end is always kept."""
    return {f: round(f * self.steps) for f in sorted({*self.milestones, 1.0})}

  def milestone_step(self, fraction: float, name: str = "fraction") -> int:
    """The step of one of the milestones.

    Raises:
      ValueError: none is kept there.
    """
    kept = self.milestone_steps()
    for known, step in kept.items():
      if abs(known - fraction) < 1e-9:
        return step
    raise ValueError(f"{name}={fraction} is not among the kept milestones {list(kept)}; add it to "
                     "sft.milestones")


@dataclasses.dataclass(frozen=True)
class Budget:
  """What every method trains with unless it sets its own, so that comparisons are fair."""

  steps: int = setting(100, "optimizer updates after SFT", low=1)
  batch_size: int = setting(
      64, "rows per step: rollouts, demonstrations, or halves of pairs", low=1
  )
  accumulation: int = setting(1, "micro-batches per step", low=1)
  max_new_tokens: int = setting(
      24, "longest response in tokens: sampled, or kept of a demonstration", low=1
  )
  optimizer: OptimizerConfig = setting(OptimizerConfig(learning_rate=1e-4, warmup_steps=5))

  def __post_init__(self):
    check_accumulation(self.batch_size, self.accumulation)


@dataclasses.dataclass(frozen=True)
class EvalSection:
  """The evaluation of every system on the held-out prompts."""

  num_prompts: int = setting(256, "number of held-out prompts; 0 takes all", low=0)
  skip_prompts: int = setting(
      0, "held-out prompts skipped first, so that settings are chosen on prompts other than those "
      "that are reported", low=0
  )
  batch_size: int = setting(64, "responses decoded or scored at a time", low=1)
  max_new_tokens: int = setting(24, "tokens per response", low=1)
  benchmark: object = slot(
      BENCHMARKS, None,
      "scores the responses; None: the one that fits the demonstrations",
  )
  metrics: dict = slots("dpr_jax.evaluation.metrics", "what is measured of every system, by name")
  frontier_samples: int = setting(
      8, "responses per prompt and temperature for the frontier of accuracy and coverage; 0: no "
      "frontier",
      low=0,
  )
  frontier_prompts: int = setting(128, "held-out prompts of the frontier; 0 takes all", low=0)
  temperatures: tuple[float, ...] = setting(
      (1.0, 0.7, 0.5, 0.35), "temperatures of the frontier, beside greedy decoding", above=0
  )
  expert: str = setting(
      "", "the model that the demonstrations were sampled from at temperature 1, with the run's "
      "vocabulary: a Hugging Face folder, .gguf or stage of a workdir; '' measures no KL to it"
  )
  heatmaps: int = setting(
      8, "number of demonstrations, and of rollouts, that the report shows token by token", low=0
  )
  corrupted_tokens: int = setting(
      256, "held-out demonstrations in which one token is replaced, to see whether the reward "
      "finds it; 0: none", low=0
  )
  reference_prompts: int = setting(
      64, "training prompts on which references are measured; 0: none", low=0
  )

  def __post_init__(self):
    if len(set(self.temperatures)) < len(self.temperatures):
      raise ValueError(f"temperatures={self.temperatures} must differ from each other")
    if self.frontier_samples and not self.temperatures:
      raise ValueError(f"temperatures=() leaves frontier_samples={self.frontier_samples} nothing "
                       "to sample at; name one at least, or set frontier_samples=0")


@dataclasses.dataclass(frozen=True)
class SweepSection:
  """Several runs that differ in one field; what they share is done once."""

  field: str = setting("", "path of a field, such as methods.dpr.beta; '' runs the config once")
  values: tuple[str, ...] = setting((), "values of the field, written as on the command line")

  def __post_init__(self):
    if self.values and not self.field:
      raise ValueError("values are given without field, such as methods.dpr.beta")


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """The device mesh; an axis of -1 takes the rest of the devices."""

  data: int = setting(1, "devices over which the batch is split; parameters are replicated", low=-1)
  fsdp: int = setting(-1, "devices over which the batch and the parameters are split", low=-1)
  tensor: int = setting(
      1, "devices over which heads, MLP columns and the vocabulary are split", low=-1
  )


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  """When the state of a stage is saved."""

  every: int = setting(200, "steps between checkpoints; the last step is always saved", low=1)
  keep: int = setting(1, "number of latest checkpoints kept, beside the milestones", low=1)


def parse_steps(text: str) -> tuple[int, int] | None:
  """'3:5' -> (3, 5), both traced, counted from 1; '' -> None.

  Raises:
    ValueError: something else.
  """
  if not text:
    return None
  match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
  if match is None:
    raise ValueError(f"{text!r} must be FIRST:LAST, steps counted from 1; for example 3:5")
  first, last = int(match[1]), int(match[2])
  if not 1 <= first <= last:
    raise ValueError(f"{text!r}: steps count from 1 and FIRST must not exceed LAST; for example "
                     "3:5")
  return first, last


@dataclasses.dataclass(frozen=True)
class LogSection:
  """What a run logs."""

  every: int = setting(1, "steps between lines of metrics.jsonl", low=1)
  progress: bool = setting(True, "whether process 0 shows progress bars on stderr")
  tensorboard: bool = setting(True, "whether to write TensorBoard files as well")
  profile_steps: str = setting("", "FIRST:LAST, the steps of each stage to profile; '': none")

  def __post_init__(self):
    parse_steps(self.profile_steps)
