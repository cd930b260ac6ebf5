"""SFT again, on the demonstrations that the reward of others does not speak against.

The demonstrations are split into K folds. For each fold an SFT run on the others gives pi_sft, its
own early checkpoint pi_ref, and so a reward of the demonstrations that it never saw:

    r(x, y) = sum_t m_t [log pi_sft(y_t | s_t) - log pi_ref(y_t | s_t)],   m_t: trained tokens.

Where r < 0, a demonstration became less likely while SFT went on: the others do not explain it. It
is left out, and SFT starts again on the rest, with the steps that it had. The sign needs no number
to choose; log pi_sft alone has none. (Cross-fitting: each demonstration is judged by models that
have not been trained on it, nor on a copy of it.)

What is compared with it: as many demonstrations chosen at random, by log pi_sft, or by whether they
are right, where the benchmark can tell.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpr_jax import sharding
from dpr_jax.config.fields import overlay, setting
from dpr_jax.data.packing import PackedRows, pack
from dpr_jax.data.templates import Example
from dpr_jax.errors import UserError, naming
from dpr_jax.evaluation.cleaning import FILE, SCORES
from dpr_jax.evaluation.token_scores import NAMES, REDUCE
from dpr_jax.methods.base import TrainedMethod
from dpr_jax.methods.sft import fine_tune, sft_programs
from dpr_jax.references.base import Reference
from dpr_jax.workdir import read_lines

_DECIDES = (*NAMES, "random", "oracle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanedSFT(TrainedMethod):
  """See the module docstring."""

  kind = "cleaned_sft"
  title = "Cleaned SFT"

  folds: int = setting(2, "parts of the demonstrations; each is judged by SFT on the others", low=2)
  reference_fraction: float = setting(
      0.1, "of the steps of that SFT, where its ref is; 0: the model before SFT", low=0, below=1
  )
  score: str = setting("reward", "what decides", choices=_DECIDES)
  reduce: str = setting("sum", "over the trained tokens", choices=tuple(REDUCE))
  keep: float | None = setting(
      None, "share of the demonstrations to keep; None: those with a reward of at least 0",
      above=0, high=1,
  )
  like: str = setting(
      "", "method whose folds and rewards are used, and how many it kept where keep is None"
  )

  reads_benchmark = True  # It tells which demonstrations are wrong.

  @property
  def subject(self):
    return not self.like

  def refers(self):
    return (self.like,) if self.like else ()

  def budget(self, config):
    """That of SFT, with what its own fields say."""
    names = ("steps", "batch_size", "accumulation", "optimizer")
    of_sft = overlay(config.budget, {name: getattr(config.sft, name) for name in names})
    return super().budget(dataclasses.replace(config, budget=of_sft))

  def own_budget(self):
    return ", ".join(filter(None, ("that of SFT, from the model before it", super().own_budget())))

  def check(self, config):
    super().check(config)
    self._check_fields()
    if not self.like and self.reference_fraction and not (
        0 < self._reference_step(config) < self.budget(config).steps
    ):
      raise ValueError(f"reference_fraction={self.reference_fraction} of "
                       f"{self.budget(config).steps} steps must leave at least one on both sides "
                       "of ref; 0 takes the model before SFT")
    if self.score == "oracle" and (
        not config.data.corrupt or config.data.corruption == "repeated"
    ):
      raise ValueError("score='oracle' needs built-in tasks of which some are wrong: "
                       "config.data.corrupt above 0, and a config.data.corruption other than "
                       "repeated")
    if self.like:
      other = config.methods.get(self.like)
      order = [n for n in config.compare if n == self.like or config.methods[n] is self]
      if not isinstance(other, CleanedSFT) or other.like or order[:1] != [self.like]:
        raise ValueError(f"like={self.like!r} must be a method of this kind, without `like`, that "
                         "config.compare lists before this one")

  def _check_fields(self) -> None:
    """Raises ValueError where a field would be passed over, or a number is missing."""
    plain = {f.name: f.default for f in dataclasses.fields(CleanedSFT)}
    unused = []
    if self.score in ("random", "oracle"):
      unused.append("reduce")
    if self.score == "oracle":
      unused.append("keep")
    if self.like:
      unused += ["folds", "reference_fraction"]
    for name in unused:
      if getattr(self, name) != plain[name]:
        because = f"like={self.like!r}" if name.startswith(("folds", "ref")) else (
            f"score={self.score!r}")
        raise ValueError(f"{name}={getattr(self, name)!r} has no effect with {because}; leave it "
                         "out")
    if not self.like and self.keep is None and self.score not in ("reward", "oracle"):
      raise ValueError(f"score={self.score!r} has no zero; set keep, or like")

  def programs(self, shapes, name):
    return sft_programs(shapes, name, self.budget(shapes.config))

  def stages(self, name):
    return (name, *(_stage(name, fold) for fold in range(0 if self.like else self.folds)))

  def train(self, run, name):
    budget, file = self.budget(run.config), run.workdir.stage(name) / FILE
    if not sharding.broadcast(file.exists()):  # One process decides: it may be there just now.
      for fold in range(0 if self.like else self.folds):
        fine_tune(run, _stage(name, fold), lambda fold=fold: self._others(run, name, fold), budget,
                  tuple(filter(None, (self._reference_step(run.config),))))
        sharding.barrier(f"{name} fold {fold}")
      self._judge(run, name)
      sharding.barrier(f"{name} judged")
    fine_tune(run, name, lambda: self._kept(run, name), budget)

  def _reference_step(self, config) -> int:
    return round(self.reference_fraction * self.budget(config).steps)

  # --- Folds -------------------------------------------------------------------------------------

  def _folds(self, run: Any, name: str) -> np.ndarray:
    with naming(f"config.methods.{name}"):
      return fold_of(
          [e.tokens[: run.config.data.row_length] for e in run.data.examples], self.folds,
          run.config.seed,
      )

  def _others(self, run: Any, name: str, fold: int) -> PackedRows:
    of_example = self._folds(run, name)
    chosen = [e for e, f in zip(run.data.examples, of_example, strict=True) if f != fold]
    return _pack(run, f"{name}: fold {fold}", chosen)

  def _judge(self, run: Any, name: str) -> None:
    """Writes what is known of each demonstration, and whether it is kept."""
    source = run.workdir.stage(self.like) / FILE if self.like else None
    lines = read_lines(source) if source else self._rewards(run, name)
    size = sum(line["kept"] for line in lines) if self.like else None
    kept = self._choose(lines, size, run)
    # The others' scores are in the file of the method that has made them.
    left_out = {*SCORES} - {f"{self.score}_{self.reduce}"} if self.like else ()
    lines = [
        {**{n: v for n, v in line.items() if n not in left_out}, "kept": bool(k)}
        for line, k in zip(lines, kept, strict=True)
    ]
    run.workdir.write(run.workdir.stage(name) / FILE, lines)
    cut = sum(line["judged"] and not line["kept"] for line in lines)
    unjudged = sum(not line["judged"] for line in lines)
    run.log(f"{name}: {sum(kept)} demonstrations kept, {cut} cut, {unjudged} not judged")

  def _rewards(self, run: Any, name: str) -> list[dict[str, Any]]:
    examples, length = run.data.examples, run.config.data.row_length
    cut = run.config.data.overlong == "truncate"
    fits = [(cut or len(e.tokens) <= length) and bool(e.loss_mask[:length].any()) for e in examples]
    of_example = self._folds(run, name)
    lines: list[dict[str, Any]] = [
        {"source": e.source, "demo": i, "fold": int(f), "judged": fit}
        for i, (e, f, fit) in enumerate(zip(examples, of_example, fits, strict=True))
    ]
    steps, early = self.budget(run.config).steps, self._reference_step(run.config)
    for fold in range(self.folds):
      chosen = [i for i, line in enumerate(lines) if line["fold"] == fold and line["judged"]]
      tokens = [examples[i].tokens[:length] for i in chosen]
      masks = [examples[i].loss_mask[:length] > 0 for i in chosen]
      sft, ref = (
          run.checkpoint(_stage(name, fold), step, run.dtype) if step else
          run.initial_variables(run.dtype) for step in (steps, early)
      )
      found = run.scorer.score(sft, Reference.of(ref), [t[:0] for t in tokens], tokens)
      for i, scores, mask_T in zip(chosen, found, masks, strict=True):
        lines[i] |= scores.of_response(mask_T)
    wrong = [run.benchmark.is_wrong(demo, demo.response) for demo in run.data.demos]
    if any(wrong):  # Else it cannot tell, or there is nothing to tell.
      lines = [{**line, "wrong": bool(w)} for line, w in zip(lines, wrong, strict=True)]
    return lines

  def _choose(self, lines: Sequence[dict[str, Any]], size: int | None, run: Any) -> np.ndarray:
    """Which demonstrations are kept, bool [N].

    Args:
      size: how many the method `like` kept.
    """
    judged = np.array([line["judged"] for line in lines])
    if self.score == "oracle":
      if not any("wrong" in line for line in lines):
        raise UserError("config.eval.benchmark: it tells of no demonstration that it is wrong, "
                        "which score='oracle' needs")
      return judged & ~np.array([line.get("wrong", False) for line in lines])
    if self.score == "random":
      scores = np.random.default_rng([run.config.seed, 2]).random(len(lines))
    else:
      field = f"{self.score}_{self.reduce}"
      scores = np.array([line.get(field, -np.inf) for line in lines])
    if size is None and self.keep is None:
      return judged & (scores >= 0)
    number = round(self.keep * judged.sum()) if self.keep is not None else size
    best = np.argsort(-np.where(judged, scores, -np.inf), kind="stable")[:number]
    return judged & np.isin(np.arange(len(lines)), best)

  def _kept(self, run: Any, name: str) -> PackedRows:
    lines = read_lines(run.workdir.stage(name) / FILE)
    chosen = [e for e, line in zip(run.data.examples, lines, strict=True) if line["kept"]]
    if not chosen:
      raise UserError(f"config.methods.{name}: no demonstration is kept; set keep to a share")
    return _pack(run, name, chosen)


def _stage(name: str, fold: int) -> str:
  return f"{name}/fold{fold}"


def _pack(run: Any, name: str, examples: Sequence[Example]) -> PackedRows:
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
  of_example = np.array([numbers.setdefault(e.tobytes(), len(numbers)) for e in examples])
  if len(numbers) < folds:
    raise UserError(f"folds={folds} exceeds the {len(numbers)} different demonstrations")
  return (np.random.default_rng([seed, 1]).permutation(len(numbers)) % folds)[of_example]


DEFAULTS = {
    "cleaned_sft": CleanedSFT(),
    "random_cut": CleanedSFT(score="random", like="cleaned_sft", label="SFT on a random cut"),
    "likelihood_cut": CleanedSFT(score="logp_sft", reduce="min", like="cleaned_sft",
                                 label="SFT, cut by likelihood"),
    "right_only": CleanedSFT(score="oracle", like="cleaned_sft", label="SFT on right ones alone"),
}
