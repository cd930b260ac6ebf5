"""Scores of demonstrations under models that have not been trained on them.

The demonstrations are split into K folds. For each fold an SFT run on the others gives pi_sft, its
own early checkpoint pi_ref, and so the scores of the demonstrations that it never saw.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpr_jax import sharding
from dpr_jax.config.sections import Budget
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.templates import Example
from dpr_jax.errors import UserError, naming
from dpr_jax.evaluation import training_dynamics as dynamics
from dpr_jax.evaluation.token_scores import REDUCE
from dpr_jax.methods.base import plan_stage, train_planned, train_side_by_side
from dpr_jax.methods.sft import fine_tuning
from dpr_jax.references.base import Reference

_margins = jax.jit(dynamics.token_margins, static_argnums=0)
_off_diagonal = jax.jit(dynamics.off_diagonal, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class CrossFit:
  """The folds of one round."""

  run: Any
  name: str  # of the method, for errors.
  stages: tuple[str, ...]  # of the workdir; one per fold.
  budget: Budget  # of the SFT runs.
  reference_step: int  # of them, where their ref is; 0: the model before SFT.
  checkpoints: int = 0  # of them at which rival scores are taken; 0: none.

  @property
  def of_example(self) -> np.ndarray:
    """The fold of each demonstration, int [N]."""
    run = self.run
    with naming(f"config.methods.{self.name}"):
      tokens = [e.tokens[: run.config.data.row_length] for e in run.data.examples]
      return fold_of(tokens, len(self.stages), run.config.seed)

  @property
  def judged(self) -> np.ndarray:
    """Which demonstrations fit a row and have a trained token in it, bool [N]."""
    data = self.run.config.data
    length, cut = data.row_length, data.overlong == "truncate"
    return np.array([
        (cut or len(e.tokens) <= length) and bool((e.loss_mask[:length] > 0).any())
        for e in self.run.data.examples
    ])

  @property
  def rival_steps(self) -> tuple[int, ...]:
    """Steps of the checkpoints of rival scores, evenly spaced; the last is the end."""
    count = self.checkpoints
    return tuple(sorted({round(self.budget.steps * (i + 1) / count) for i in range(count)} - {0}))

  def train(self, examples: Sequence[Example | None]) -> None:
    """An SFT run for each fold; all at once, where the axis `data` of the mesh can be split.

    Args:
      examples: what stands for each demonstration; None where it is left out.

    Raises:
      UserError: a fold has nothing to judge, or nothing is left to train its model on.
    """
    of_example, judged = self.of_example, self.judged
    for fold in range(len(self.stages)):
      if not (judged & (of_example == fold)).any():
        raise UserError(f"config.methods.{self.name}: fold {fold} has no demonstration that can be "
                        "judged; take fewer folds, or raise config.data.row_length")
    kept = (*filter(None, (self.reference_step,)), *self.rival_steps)

    def rows(fold: int) -> PackedRows:
      pairs = zip(examples, of_example, strict=True)
      chosen = [e for e, f in pairs if e is not None and f != fold]
      return rows_of(self.run, f"{self.name}: the others of fold {fold}", chosen)

    runs = self._runs()
    planned = [
        plan_stage(run, stage, self.budget.steps,
                   fine_tuning(run, stage, functools.partial(rows, fold), self.budget), kept)
        for fold, (run, stage) in enumerate(zip(runs, self.stages, strict=True))
    ]
    if runs[0] is not self.run:
      return train_side_by_side(planned)
    for stage in planned:
      train_planned(stage)
      sharding.barrier(stage.stage.name)

  def _runs(self) -> list[Any]:
    """The run of each fold: on a part of the mesh each, where its axis `data` can be split."""
    count = len(self.stages)
    parts = sharding.split_mesh(self.run.mesh, count) if jax.process_count() == 1 else []
    if not parts:
      return [self.run] * count
    self.run.release()
    return [dataclasses.replace(self.run, mesh=mesh, _held={}) for mesh in parts]

  def scores(self) -> list[dict[str, Any]]:
    """A line for each demonstration, with its scores where it is judged."""
    examples, of_example, judged = self.run.data.examples, self.of_example, self.judged
    lines: list[dict[str, Any]] = [
        {"source": e.source, "demo": i, "fold": int(f), "judged": bool(j)}
        for i, (e, f, j) in enumerate(zip(examples, of_example, judged, strict=True))
    ]
    logps: dict[int, np.ndarray] = {}
    for fold in range(len(self.stages)):
      chosen = np.flatnonzero(judged & (of_example == fold))
      sft, ref = (self._checkpoint(fold, step) for step in (self.budget.steps, self.reference_step))
      tokens = [self._tokens(i) for i in chosen]
      found = self.run.scorer.score(sft, Reference.of(ref), _none_before(tokens), tokens)
      for i, scores in zip(chosen, found, strict=True):
        mask_T = self._mask(i)
        logps[int(i)] = scores.logp_sft[mask_T]
        lines[i] |= scores.of_response(mask_T)
        lines[i] |= {"token_rewards": _rounded(scores.token_rewards[mask_T]),
                     "logp_sft": _rounded(scores.logp_sft[mask_T])}
    if self.checkpoints:
      self._add_rivals(lines, of_example, judged, logps)
    return lines

  def _add_rivals(self, lines: list[dict[str, Any]], of_example, judged, logps) -> None:
    """Area under the margin and forgetting of what a model was trained on; confident learning.

    Args:
      logps: of the trained tokens of each judged demonstration under the model that judges it.
    """
    margins: dict[int, list[np.ndarray]] = {int(i): [] for i in np.flatnonzero(judged)}
    for fold in range(len(self.stages)):
      chosen = np.flatnonzero(judged & (of_example != fold))
      steps = [self._per_token(_margins, fold, step, chosen) for step in self.rival_steps]
      for i, *of_steps in zip(chosen, *steps, strict=True):
        margins[int(i)].append(np.stack(of_steps))
    for i, of_models in margins.items():
      mean_T = np.mean([m.mean(axis=0) for m in of_models], axis=0, dtype=np.float64)
      lines[i] |= {f"aum_{how}": float(reduce(mean_T)) for how, reduce in REDUCE.items()}
      lines[i]["forgetting"] = -float(np.mean([dynamics.forgotten(m) for m in of_models]))
    every = np.flatnonzero(judged)
    thresholds_V = jnp.asarray(dynamics.class_thresholds(
        [self._tokens(i)[self._mask(i)] for i in every],
        [logps[int(i)] for i in every], self.run.model.cfg.vocab_size,
    ))
    for fold in range(len(self.stages)):
      chosen = np.flatnonzero(judged & (of_example == fold))
      steps = self.budget.steps
      flags = self._per_token(_off_diagonal, fold, steps, chosen, thresholds_V)
      for i, flag_T in zip(chosen, flags, strict=True):
        lines[i]["confident"] = 0.0 - float(flag_T.sum())

  def _per_token(self, score, fold: int, step: int, chosen, *more) -> list[np.ndarray]:
    """score(model, variables, tokens, segments) of the trained tokens of the chosen, [T_i] each."""
    variables, tokens = self._checkpoint(fold, step), [self._tokens(i) for i in chosen]
    of_rows = lambda *rows: score(self.run.model, variables, *rows, *more)
    found = self.run.scorer.per_response(of_rows, _none_before(tokens), tokens)
    return [x[self._mask(i)] for i, x in zip(chosen, found, strict=True)]

  def _checkpoint(self, fold: int, step: int) -> Any:
    run = self.run
    if not step:
      return run.initial_variables(run.dtype)
    return run.checkpoint(self.stages[fold], step, run.dtype)

  def _tokens(self, i: int) -> np.ndarray:
    return self.run.data.examples[i].tokens[: self.run.config.data.row_length]

  def _mask(self, i: int) -> np.ndarray:
    return self.run.data.examples[i].loss_mask[: self.run.config.data.row_length] > 0


def _none_before(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Empty prompts: an example is scored from its first token on."""
  return [t[:0] for t in tokens]


def _rounded(values_T: np.ndarray) -> list[float]:
  return [round(float(v), 4) for v in values_T]


def rows_of(run: Any, name: str, examples: Sequence[Example]) -> PackedRows:
  """Examples packed as those of SFT; `name` for errors."""
  data = run.config.data
  with naming(f"config.methods.{name}"):
    return pack(examples, data.row_length, data.overlong, run.config.seed)


def fold_of(examples: Sequence[np.ndarray], folds: int, seed: int) -> np.ndarray:
  """The fold of each example, int [N]: random, equally large, copies of one together.

  Args:
    examples: their tokens, int32 [T_i].

  Raises:
    UserError: fewer different examples than folds.
  """
  numbers: dict[bytes, int] = {}
  of_example = np.array([numbers.setdefault(e.tobytes(), len(numbers)) for e in examples], int)
  if len(numbers) < folds:
    raise UserError(f"folds={folds} exceeds the {len(numbers)} different demonstrations")
  return (np.random.default_rng([seed, 1]).permutation(len(numbers)) % folds)[of_example]
