"""The order of stages: sft, dpr, baselines, evaluate, report. Each goes on where it stopped.

A stage that trains restores its own last checkpoint; a finished one returns at once. What
was evaluated lies in samples/ and is not evaluated again.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from dpr_jax import config as config_lib
from dpr_jax import sharding, weights
from dpr_jax.data.dataset import Dataset, build_dataset
from dpr_jax.data.loader import Batches, Prompts, prompt_batches, sft_batches
from dpr_jax.data.packing import pack
from dpr_jax.data.templates import encode_demo, encode_response, stop_ids
from dpr_jax.errors import UserError
from dpr_jax.evals import systems as systems_lib
from dpr_jax.evals.results import NLL_FILE, build_results
from dpr_jax.evals.scoring import response_logps, score_record, score_responses
from dpr_jax.evals.systems import System, evaluate_system, system_file
from dpr_jax.loading import initial_variables, root_key, stage_variables
from dpr_jax.losses import make_reinforce_loss, make_sft_loss
from dpr_jax.models import Transformer
from dpr_jax.models.lora import split_trainable
from dpr_jax.models.variables import abstract_variables, extrapolate
from dpr_jax.report import write_report
from dpr_jax.rewards import transforms
from dpr_jax.rewards.references import milestone_steps, reference_step
from dpr_jax.rollout import Sampling, make_rollout_step
from dpr_jax.training import TrainState, make_train_step
from dpr_jax.training.dpr_step import make_dpr_step
from dpr_jax.training.loop import run_stage
from dpr_jax.training.optimizer import make_optimizer, make_schedule
from dpr_jax.training.steps import abstract_state
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.workdir import Workdir, read_lines, write_json, write_lines


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a run: what all its stages share."""

  config: config_lib.RunConfig
  workdir: Workdir
  mesh: jax.sharding.Mesh
  tokenizer: Any
  model: Transformer
  stop_ids: tuple[int, ...]
  data: Dataset

  @property
  def dtype(self) -> str:
    """The compute dtype, in which sft and ref are held."""
    return self.model.cfg.dtype

  def rng(self, name: str) -> jax.Array:
    return root_key(self.config.seed, name)

  def initial_variables(self, dtype: str) -> Any:
    config = self.config
    return initial_variables(config.model, self.model.cfg, self.mesh, config.seed, dtype)

  @functools.cached_property
  def frozen(self) -> Any:
    """What no stage trains, shared by policy, sft and ref: the base under LoRA, else nothing."""
    if not self.model.cfg.lora.rank:
      return {}
    return split_trainable(self.initial_variables(self.dtype))[1]

  def stage_variables(self, stage: str, step: int, dtype: str) -> Any:
    return stage_variables(
        self.workdir.stage(stage), step, self.model.cfg, self.mesh, dtype, self.frozen
    )

  def load(self, name: str) -> Any:
    """The parameter set called `name`, in the compute dtype: base, ref, sft, dpr, a baseline."""
    config = self.config
    if name == "base":
      return self.initial_variables(self.dtype)
    if name == "ref":
      step = reference_step(config.reference.fraction, config.sft.milestones, config.sft.steps)
      return self.stage_variables("sft", step, self.dtype)
    if name == "extrapolated":
      return extrapolate(self.load("sft"), self.load("ref"), contrastive_alpha(config))
    steps = config.sft.steps if name == "sft" else config.dpr.steps
    return self.stage_variables(name, steps, self.dtype)

  def bar(self, name: str, total: int, unit: str):
    """A progress bar, from process 0."""
    hidden = not self.config.log.progress or jax.process_index() != 0
    return tqdm.tqdm(
        total=total, desc=name, unit=unit, disable=hidden, dynamic_ncols=True, mininterval=0.5
    )


def contrastive_alpha(config: config_lib.RunConfig) -> float:
  """Strength of the training-free controls: that of DPR's optimum unless set."""
  return config.eval.contrastive_alpha or 1.0 / config.dpr.beta


# --- Setting up ------------------------------------------------------------------------------------


def compute_dtype(dtype: str) -> str:
  """auto: bfloat16 on TPU and GPU, float32 on CPU."""
  if dtype != "auto":
    return dtype
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def build_model(config: config_lib.RunConfig) -> tuple[Any, Transformer, tuple[int, ...], str]:
  """(tokenizer, model, stop ids, origin of the weights).

  Raises:
    UserError: unreadable weights or tokenizer, or a length beyond what the model was trained for.
  """
  section = config.model
  how = {"dtype": compute_dtype(section.dtype), "remat": section.remat, "lora": section.lora}
  generation_config = None
  if section.pretrained:
    tokenizer = weights.load_tokenizer(section.pretrained)
    generation_config = weights.load_generation_config(section.pretrained)
    cfg = dataclasses.replace(weights.load_config(section.pretrained), **how)
    origin = section.pretrained
  else:
    tokenizer = byte_tokenizer()
    cfg = dataclasses.replace(
        section.shape, vocab_size=section.shape.vocab_size or len(tokenizer), **how
    )
    if cfg.vocab_size < len(tokenizer):
      raise UserError(
          f"config.model.shape.vocab_size={cfg.vocab_size} is below the {len(tokenizer)} tokens of "
          "the tokenizer; 0 takes that number"
      )
    origin = "random"
  new = max(config.dpr.max_new_tokens, config.eval.max_new_tokens)
  for field, length in (
      ("data.row_length", config.data.row_length),
      ("data.prompt_length + max_new_tokens", config.data.prompt_length + new),
  ):
    if length > cfg.max_length:
      raise UserError(
          f"config.{field}={length} exceeds the {cfg.max_length} tokens that the model was made for"
      )
  ends = stop_ids(tokenizer, generation_config, config.data.template)
  return tokenizer, Transformer(cfg), ends, origin


def set_up(config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh) -> Run:
  """Everything that can be wrong with the input shows here, before anything is written."""
  workdir.check(config)
  sharding.check_batch(
      mesh,
      sft__batch_size=config.sft.batch_size // config.sft.accumulation,
      dpr__batch_size=config.dpr.batch_size // config.dpr.accumulation,
      eval__batch_size=config.eval.batch_size,
  )
  milestone_steps(config.sft.milestones, config.sft.steps)
  reference_step(config.reference.fraction, config.sft.milestones, config.sft.steps)
  tokenizer, model, ends, origin = build_model(config)
  data = build_dataset(config.data, tokenizer, config.seed)
  workdir.claim(
      config,
      model={
          "source": origin,
          "num_params": model.cfg.num_params,
          "config": model.cfg.to_dict(),
          "stop_ids": list(ends),
      },
      data=data.summary,
      devices={"platform": jax.default_backend(), "count": jax.device_count()},
  )
  if jax.process_index() == 0:
    tokenizer.save_pretrained(workdir.tokenizer)
  return Run(config, workdir, mesh, tokenizer, model, ends, data)


# --- Stages that train -----------------------------------------------------------------------------


def train(
    run: Run,
    name: str,
    section: Any,
    step_fn: Callable,
    optimizer: Any,
    batches: Batches,
    variables: Callable[[], Any],
    keep_steps: tuple[int, ...] = (),
) -> None:
  """Runs one stage to its end. `section` is config.sft or config.dpr; baselines use the latter."""
  config, rng = run.config, run.rng(name)
  abstract, _ = split_trainable(abstract_variables(run.model.cfg, run.mesh))

  def make_state():
    trainable, _ = split_trainable(variables())
    return TrainState.create(trainable, optimizer, rng, run.frozen)

  run_stage(
      name,
      step_fn,
      make_state=make_state,
      abstract=abstract_state(abstract, optimizer, rng),
      frozen=run.frozen,
      batches=batches,
      steps=section.steps,
      directory=run.workdir.stage(name),
      mesh=run.mesh,
      checkpoint_every=config.checkpoint.every,
      checkpoint_keep=config.checkpoint.keep,
      keep_steps=keep_steps,
      log_every=config.log.every,
      progress=config.log.progress,
      tensorboard_dir=run.workdir.tensorboard / name if config.log.tensorboard else None,
      schedule=make_schedule(section.optimizer, section.steps),
  )


def _processes() -> dict[str, int]:
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def sft_stage(run: Run) -> None:
  section = run.config.sft
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_sft_loss(run.model, chunk_size=run.config.model.chunk_size)
  train(
      run,
      "sft",
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      sft_batches(run.data.rows, section.batch_size, run.config.seed, **_processes()),
      lambda: run.initial_variables("float32"),
      keep_steps=tuple(milestone_steps(section.milestones, section.steps).values()),
  )


def sft_float32(run: Run) -> Any:
  """Where every later stage starts: the last SFT parameters, as they were trained."""
  return run.stage_variables("sft", run.config.sft.steps, "float32")


def dpr_stage(run: Run) -> None:
  section, chunk_size = run.config.dpr, run.config.model.chunk_size
  if not section.steps:
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  rollout_step = make_rollout_step(
      run.model,
      max_new_tokens=section.max_new_tokens,
      stop_ids=run.stop_ids,
      sampling=Sampling(section.temperature, section.top_k, section.top_p),
      reward=section.reward,
      chunk_size=chunk_size,
  )
  loss_fn = make_reinforce_loss(run.model, normaliser=section.normaliser, chunk_size=chunk_size)
  dpr_step = make_dpr_step(
      rollout_step,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      sft=run.load("sft"),
      ref=run.load("ref"),
      rng=run.rng("dpr/rollouts"),
      beta=section.beta,
      gamma=section.gamma,
      returns=section.returns,
      baseline=section.baseline,
      group_size=section.samples_per_prompt,
      truncated=section.truncated,
      transform=transforms.clip(-section.clip, section.clip) if section.clip else None,
  )
  batches = prompt_batches(
      run.data.prompts.tokens,
      section.batch_size,
      run.config.data.prompt_length,
      run.config.seed,
      samples_per_prompt=section.samples_per_prompt,
      **_processes(),
  )
  train(run, "dpr", section, dpr_step, optimizer, batches, lambda: sft_float32(run))


def continued_sft_stage(run: Run) -> None:
  """The control: SFT for as many steps, sequences, tokens and at the learning rate of DPR.

  A step takes one demonstration a row for each of DPR's rollouts, on the same prompts, its
  response cut where a rollout would be; so both train on about as many tokens (the report has
  the counts).
  """
  section, data = run.config.dpr, run.config.data
  if not section.steps:
    return
  optimizer = make_optimizer(section.optimizer, section.steps)
  loss_fn = make_sft_loss(run.model, chunk_size=run.config.model.chunk_size)
  examples = [
      encode_demo(demo, run.tokenizer, "last", data.template) for demo in run.data.prompts.demos
  ]
  longest = data.prompt_length + section.max_new_tokens
  examples = [
      dataclasses.replace(
          e,
          tokens=e.tokens[: len(p) + section.max_new_tokens],
          loss_mask=e.loss_mask[: len(p) + section.max_new_tokens],
      )
      for e, p in zip(examples, run.data.prompts.tokens, strict=True)
  ]
  rows = pack(examples, longest, packed=False)
  train(
      run,
      "continued_sft",
      section,
      make_train_step(loss_fn, optimizer, accumulation=section.accumulation),
      optimizer,
      # Another order than SFT's, which has just seen these demonstrations.
      sft_batches(rows, section.batch_size, run.config.seed + 1, **_processes()),
      lambda: sft_float32(run),
  )


# --- Evaluation and report -------------------------------------------------------------------------


def trained_systems(run: Run) -> list[System]:
  later = ("continued_sft", "dpr") if run.config.dpr.steps else ()
  return [System(name, (name,)) for name in ("base", "ref", "sft", *later)]


def heldout_prompts(run: Run) -> Prompts:
  """The held-out prompts that are evaluated: the first `eval.num_prompts` of them."""
  n = run.config.eval.num_prompts or len(run.data.heldout.tokens)
  held = run.data.heldout
  return held._replace(tokens=held.tokens[:n], demos=held.demos[:n])


def evaluate_stage(run: Run) -> None:
  """Every system on the held-out prompts, and the likelihood of the held-out demonstrations."""
  config, section = run.config, run.config.eval
  prompts = heldout_prompts(run)
  demonstrated = [
      encode_response(d.response, d.prompt, run.tokenizer, config.data.template)
      for d in prompts.demos
  ]
  # Only lengths that the model can take; a cut response has no likelihood as a whole.
  fits = [
      i
      for i, (p, r) in enumerate(zip(prompts.tokens, demonstrated))
      if len(p) + len(r) <= run.model.cfg.max_length
  ]
  nll_file = run.workdir.samples / NLL_FILE
  nll = json.loads(nll_file.read_text()) if nll_file.exists() else {}
  verifier = run.data.verifier if section.verifier == "auto" else section.verifier
  trained = trained_systems(run)
  controls = systems_lib.controls(
      section.controls, contrastive_alpha(config), section.low_temperature
  )
  todo = [s for s in trained + controls if not system_file(run.workdir.samples, s.name).exists()]
  scoring = {
      "mesh": run.mesh, "batch_size": section.batch_size, "chunk_size": config.model.chunk_size
  }
  for system in todo:
    loaded = {name: run.load(name) for name in system.members}
    if len(system.members) == 1 and system in trained:
      logps = response_logps(
          run.model,
          loaded[system.name],
          [prompts.tokens[i] for i in fits],
          [demonstrated[i] for i in fits],
          **scoring,
      )
      nll[system.name] = [-float(x.astype(np.float64).sum()) for x in logps]
      write_json(nll_file, nll)
    with run.bar(f"evaluate {system.name}", len(prompts.tokens) * len(system.modes), "response") as bar:
      records = evaluate_system(
          system,
          run.model,
          loaded.__getitem__,
          prompts,
          run.tokenizer,
          verifier=verifier,
          rng=run.rng("evaluate"),
          seed=config.seed,
          stop_ids=run.stop_ids,
          mesh=run.mesh,
          batch_size=section.batch_size,
          prompt_length=config.data.prompt_length,
          max_new_tokens=section.max_new_tokens,
          on_batch=bar.update,
      )
    # Last, and whole: a system whose file exists is done.
    write_lines(system_file(run.workdir.samples, system.name), records)
  _barrier("evaluate")
  _heatmaps(run, prompts, demonstrated, scoring)


def _heatmaps(run: Run, prompts, demonstrated, scoring) -> None:
  """Token rewards of some held-out demonstrations, and of the last policy's answers to them."""
  policy = "dpr" if run.config.dpr.steps else "sft"
  answers = [r for r in read_lines(system_file(run.workdir.samples, policy)) if r["mode"] == "sampled"]
  n = min(run.config.eval.heatmaps, len(prompts.demos))
  # (text, token ids) of each response; the sampled ids themselves, never the text encoded again.
  sources = {
      "heatmap_demos": [(d.response, t) for d, t in zip(prompts.demos[:n], demonstrated)],
      "heatmap_rollouts": [(a["response"], np.asarray(a["token_ids"])) for a in answers[:n]],
  }
  files = {name: run.workdir.samples / f"{name}.jsonl" for name in sources}
  if not n or all(path.exists() for path in files.values()):
    return
  sft, ref = run.load("sft"), run.load("ref")
  for name, items in sources.items():
    tokens = [t for _, t in items]
    scores = score_responses(run.model, sft, ref, prompts.tokens[:n], tokens, **scoring)
    records = [
        {"messages": list(d.prompt), "response": text, "correct": None, **score_record(run.tokenizer, t, s)}
        for d, (text, t), s in zip(prompts.demos, items, scores)
    ]
    if name == "heatmap_rollouts":
      for record, answer in zip(records, answers):
        record["correct"] = answer["correct"]
    write_lines(files[name], records)


def _barrier(name: str) -> None:
  """Process 0 writes files that others read."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def report_stage(workdir: Workdir, parts: list[Workdir], seeds: list[int]) -> dict[str, Any]:
  results = build_results([w.path for w in parts], seeds)
  if jax.process_index() == 0:
    write_json(workdir.report / "results.json", results)
    write_report(workdir.path)
  return results


# --- The run ---------------------------------------------------------------------------------------

STAGES: tuple[tuple[str, Callable[[Run], None]], ...] = (
    ("sft", sft_stage),
    ("dpr", dpr_stage),
    ("continued_sft", continued_sft_stage),
    ("evaluate", evaluate_stage),
)


def run_seed(config: config_lib.RunConfig, workdir: Workdir, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """All stages of one seed; returns its results."""
  run = set_up(config, workdir, mesh)
  for name, stage in STAGES:
    stage(run)
    _barrier(name)
  return report_stage(workdir, [workdir], [config.seed])


def cache_compilations(workdir: Workdir) -> None:
  """Keeps compiled programs in the workdir, for its seeds and for a run that goes on.

  JAX_COMPILATION_CACHE_DIR names another place, to be shared by several runs.
  """
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(workdir.compilations))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(config: config_lib.RunConfig, workdir: str) -> dict[str, Any]:
  """Runs a config from wherever it stopped to its report.

  Args:
    workdir: a folder that does not exist, is empty, or holds an earlier part of the same run.

  Returns:
    The content of report/results.json.

  Raises:
    UserError: anything wrong with the config, the data, the weights or the workdir.
  """
  section = config.mesh
  mesh = sharding.make_mesh(section.data, section.fsdp, section.tensor)
  root = Workdir(workdir)
  root.check(config)
  cache_compilations(root)
  with jax.set_mesh(mesh):
    if config.seeds == 1:
      return run_seed(config, root, mesh)
    root.claim(config)
    seeds = list(range(config.seed, config.seed + config.seeds))
    parts = [Workdir(root.path / f"seed_{seed}") for seed in seeds]
    for seed, part in zip(seeds, parts):
      print(f"seed {seed}", file=sys.stderr)
      run_seed(dataclasses.replace(config, seed=seed, seeds=1), part, mesh)
    return report_stage(root, parts, seeds)
