"""SFT again, on the demonstrations that the reward of others does not speak against.

Cross-fitting (`methods.cross_fitting`) gives a reward of each demonstration from SFT on others,

    r(x, y) = sum_t m_t [log pi_sft(y_t | s_t) - log pi_ref(y_t | s_t)],   m_t: trained tokens.

Where r < 0, a demonstration became less likely while SFT went on: the others do not explain it. It
is left out, and SFT starts again on the rest, with the steps that it had. The sign needs no number
to choose; log pi_sft alone has none. In place of whole demonstrations their tokens can be left out,
or a demonstration can be given the weight min(cap, exp(r / tau)).

What is compared with it: as many demonstrations chosen at random, by log pi_sft, by other measures
of wrong labels (`evaluation.training_dynamics`), or by whether they are right, where the benchmark
can tell.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax import sharding
from dpr_jax.config.fields import setting
from dpr_jax.data.templates import Example
from dpr_jax.errors import UserError
from dpr_jax.evaluation.cleaning import FILE, RIVALS, SCORES, TOKENS
from dpr_jax.evaluation.token_scores import NAMES, REDUCE
from dpr_jax.methods.cross_fitting import CrossFit, rows_of
from dpr_jax.methods.from_start import FromStart
from dpr_jax.methods.sft import fine_tune, sft_programs
from dpr_jax.workdir import read_lines

_REDUCED = (*NAMES, "aum")  # Scores of tokens.
_PLAIN = ("forgetting", "confident", "random", "oracle")
_ZERO = ("reward", "confident", "oracle")  # Their sign is a cut.

_CANNOT_TELL = ("config.eval.benchmark: it cannot tell which demonstrations are wrong, which "
                "score='oracle' needs")

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanedSFT(FromStart):
  """See the module docstring."""

  kind = "cleaned_sft"
  title = "Cleaned SFT"

  folds: int = setting(2, "parts of the demonstrations; each is judged by SFT on the others", low=2)
  reference_fraction: float = setting(
      0.1, "of the steps of that SFT, where its ref is; 0: the model before SFT", low=0, below=1
  )
  rounds: int = setting(
      1, "times that this is done; from the second on, folds train on what was kept", low=1
  )
  score: str = setting(
      "reward", "what decides: reward, logp_sft, endogenous, random, oracle (whether it is right), "
      "or a rival: area under the margin, forgetting, confident learning",
      choices=(*_REDUCED, *_PLAIN),
  )
  reduce: str = setting("sum", "over the trained tokens", choices=tuple(REDUCE))
  treatment: str = setting(
      "cut", "leave out a demonstration with a low score (cut), its tokens with one (mask), or "
      "give it the weight min(weight_cap, exp(score / tau)) (weight)",
      choices=("cut", "mask", "weight"),
  )
  keep: float | None = setting(
      None, "share to keep, of the demonstrations (cut) or of their tokens (mask); None: those "
      "with a score of at least 0", above=0, high=1,
  )
  tau: float = setting(1.0, "nats, of treatment=weight", above=0)
  weight_cap: float = setting(1.0, "largest weight of treatment=weight", above=0)
  rival_checkpoints: int = setting(
      0, "checkpoints of each fold from which the scores aum, forgetting and confident are made; "
      "0: they are not", low=0,
  )
  like: str = setting(
      "", "method whose folds and scores are used, and how many it kept where keep is None and the "
      "score has no zero"
  )

  reads_benchmark = True  # It tells which demonstrations are wrong.

  @property
  def subject(self):
    return not self.like

  def refers(self):
    return (self.like,) if self.like else ()

  def check(self, config):
    super().check(config)
    steps = self.budget(config).steps
    self._check_fields()
    if not self.like and self.reference_fraction and not 0 < self.reference_step(config) < steps:
      raise ValueError(f"reference_fraction={self.reference_fraction} of {steps} steps must leave "
                       "at least one on both sides of ref; 0 takes the model before SFT")
    if self.rival_checkpoints == 1 or self.rival_checkpoints > steps:
      raise ValueError(f"rival_checkpoints={self.rival_checkpoints} must be 2 to {steps}, the "
                       "steps of SFT; 0 leaves these scores out")
    if self.score == "oracle" and not config.data.demos and (
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
      if other.treatment != "cut" and self._takes_size:
        raise ValueError(f"like={self.like!r} keeps all demonstrations, with "
                         f"treatment={other.treatment!r}; set keep")
      if self.score in RIVALS and not other.rival_checkpoints:
        raise ValueError(f"score={self.score!r} needs config.methods.{self.like}."
                         "rival_checkpoints of at least 2")

  def _check_fields(self) -> None:
    """Raises ValueError where a field would be passed over, or a number is missing."""
    unused: dict[str, str] = {}
    if self.score not in _REDUCED:
      unused["reduce"] = f"score={self.score!r}"
    if self.treatment == "mask":
      unused["reduce"] = "treatment='mask'"
    if self.treatment != "weight":
      unused |= {name: f"treatment={self.treatment!r}" for name in ("tau", "weight_cap")}
    if self.treatment == "weight":
      unused["keep"] = "treatment='weight'"
    if self.score == "oracle":
      unused["keep"] = "score='oracle'"
    if self.like:
      unused |= {name: f"like={self.like!r}"
                 for name in ("folds", "reference_fraction", "rounds", "rival_checkpoints")}
    plain = {f.name: f.default for f in dataclasses.fields(CleanedSFT)}
    for name, because in unused.items():
      if getattr(self, name) != plain[name]:
        raise ValueError(f"{name}={getattr(self, name)!r} has no effect with {because}; leave it "
                         "out")
    if self.treatment == "mask" and self.score not in TOKENS:
      raise ValueError(f"treatment='mask' needs the score of a token: {' or '.join(TOKENS)}, "
                       f"not {self.score!r}")
    if self.treatment == "weight" and self.score not in _REDUCED:
      raise ValueError(f"treatment='weight' needs a score in nats, not {self.score!r}")
    if self.score in RIVALS and not self.like and not self.rival_checkpoints:
      raise ValueError(f"score={self.score!r} needs rival_checkpoints of at least 2")
    if self._takes_size and (not self.like or self.treatment == "mask"):
      raise ValueError(f"score={self.score!r} has no zero; set keep, or like")

  @property
  def _takes_size(self):
    """Whether something else has to say how many are kept."""
    return self.keep is None and self.treatment != "weight" and self.score not in _ZERO

  def programs(self, shapes, name):
    return sft_programs(shapes, name, self.budget(shapes.config))

  def stages(self, name):
    rounds = () if self.like else range(1, self.rounds + 1)
    return (name, *(stage for n in rounds for stage in self._fold_stages(name, n)))

  def _fold_stages(self, name: str, number: int) -> tuple[str, ...]:
    of_round = name if number == 1 else f"{name}/round{number}"
    return tuple(f"{of_round}/fold{fold}" for fold in range(self.folds))

  def reference_step(self, config):
    """Of the folds and of the result."""
    return round(self.reference_fraction * self.budget(config).steps)

  def train(self, run, name):
    self.judge(run, name)
    kept = tuple(filter(None, (self.reference_step(run.config),)))
    fine_tune(run, name, lambda: self._rows(run, name), self.budget(run.config), kept)

  # --- Judging -----------------------------------------------------------------------------------

  def judge(self, run: Any, name: str) -> list[dict[str, Any]]:
    """Writes what is known of each demonstration and whether it is kept, unless it is there.

    Returns:
      The lines of the file, one per demonstration of `run.data`.

    Raises:
      UserError: fewer demonstrations than folds, or a fold without one that can be judged.
    """
    folder = run.workdir.stage(name)
    if not sharding.broadcast((folder / FILE).exists()):  # One decides: it may be there just now.
      if self.like:
        source = read_lines(run.workdir.stage(self.like) / FILE)
        self._write(run, name, FILE, source, sum(line["kept"] for line in source))
      else:
        self._cross_fit(run, name)
    return read_lines(folder / FILE)

  def _cross_fit(self, run: Any, name: str) -> None:
    budget, earlier = self.budget(run.config), None
    if self.score == "oracle" and run.benchmark.wrong_demos(run.data.demos) is None:
      raise UserError(_CANNOT_TELL)
    for number in range(1, self.rounds + 1):
      file = FILE if number == self.rounds else f"round{number}_{FILE}"
      path = run.workdir.stage(name) / file
      if not sharding.broadcast(path.exists()):
        fit = CrossFit(run, name, self._fold_stages(name, number), budget,
                       self.reference_step(run.config), self.rival_checkpoints)
        fit.train(run.data.examples if earlier is None else self._treated(run, earlier))
        self._write(run, name, file, _with_labels(run, fit.scores()), None)
      earlier = read_lines(path)

  def _write(self, run: Any, name: str, file: str, lines: Sequence[Line], size: int | None) -> None:
    """Writes the lines with what is to be done with each.

    Args:
      size: how many the method `like` kept.
    """
    out = self.decide(lines, size, run.config.seed)
    if self.like:  # The others' scores are in the file of the method that has made them.
      own = f"{self.score}_{self.reduce}" if self.score in _REDUCED else self.score
      dropped = {*SCORES, *TOKENS} - {own}
      out = [{n: v for n, v in line.items() if n not in dropped} for line in out]
    run.workdir.write(run.workdir.stage(name) / file, out)
    kept, judged = (sum(line[n] for line in out) for n in ("kept", "judged"))
    run.log(f"{name}: {kept} demonstrations kept, {judged - kept} cut, {len(out) - judged} not "
            "judged")
    sharding.barrier(f"{name} {file}")

  def decide(self, lines: Sequence[Line], size: int | None, seed: int) -> list[dict[str, Any]]:
    """The lines with `kept`; and `weight`, or `tokens_kept` (0 or 1 each), by the treatment.

    Args:
      lines: with `judged`, and the scores where that is true.
      size: how many to keep, where neither `keep` nor the sign of the score says it.
      seed: of score=random.

    Raises:
      UserError: score=oracle where no line says what is wrong.
    """
    judged = np.array([line["judged"] for line in lines])
    if self.treatment == "mask":
      masks = self._token_masks(lines, judged)
      return [{**line, "kept": bool(sum(m)), **({"tokens_kept": m} if line["judged"] else {})}
              for line, m in zip(lines, masks, strict=True)]
    scores = self.scores_of(lines, seed)
    if self.treatment == "weight":
      weights = np.minimum(self.weight_cap, np.exp(np.minimum(scores / self.tau, 80.0)))
      return [{**line, "kept": bool(j), **({"weight": float(w)} if j else {})}
              for line, j, w in zip(lines, judged, weights, strict=True)]
    if self.keep is None and self.score in _ZERO:
      kept = judged & (scores >= 0)
    else:
      number = round(self.keep * judged.sum()) if self.keep is not None else size
      # Equal scores, as counts have them, in an order of chance and not in that of the file.
      tie = np.random.default_rng([seed, 3]).random(len(lines))
      best = np.lexsort((tie, -np.where(judged, scores, -np.inf)))[:number]
      kept = judged & np.isin(np.arange(len(lines)), best)
    return [{**line, "kept": bool(k)} for line, k in zip(lines, kept, strict=True)]

  def scores_of(self, lines: Sequence[Line], seed: int) -> np.ndarray:
    """What decides of each line, float64 [N]; -inf where it is not judged."""
    if self.score == "oracle":
      if not any("wrong" in line for line in lines):
        raise UserError(_CANNOT_TELL)
      return np.array([-1.0 if line.get("wrong", False) else 0.0 for line in lines])
    if self.score == "random":
      return np.random.default_rng([seed, 2]).random(len(lines))
    field = f"{self.score}_{self.reduce}" if self.score in _REDUCED else self.score
    return np.array([line.get(field, -np.inf) for line in lines])

  def _token_masks(self, lines: Sequence[Line], judged: np.ndarray) -> list[list[int]]:
    field = TOKENS[self.score]
    values = [np.array(line[field]) if j else np.zeros(0) for line, j in zip(lines, judged)]
    least = 0.0 if self.keep is None else np.quantile(np.concatenate(values), 1 - self.keep)
    return [(v >= least).astype(int).tolist() for v in values]

  # --- Training on it ----------------------------------------------------------------------------

  def _treated(self, run: Any, lines: Sequence[Line]) -> list[Example | None]:
    """What stands for each demonstration in training; None where it is left out."""
    return [treated(e, line) for e, line in zip(run.data.examples, lines, strict=True)]

  def _rows(self, run: Any, name: str) -> Any:
    lines = read_lines(run.workdir.stage(name) / FILE)
    chosen = [e for e in self._treated(run, lines) if e is not None]
    if not chosen:
      raise UserError(f"config.methods.{name}: no demonstration is kept; set keep to a share")
    return rows_of(run, name, chosen)


def treated(example: Example, line: Line) -> Example | None:
  """A demonstration as it is trained on after `CleanedSFT.decide`."""
  if not line["kept"]:
    return None
  mask_T = example.loss_mask
  if "weight" in line:
    mask_T = mask_T * np.float32(line["weight"])
  if "tokens_kept" in line:
    mask_T, of_tokens = mask_T.copy(), np.array(line["tokens_kept"], np.float32)
    trained = np.flatnonzero(mask_T > 0)
    mask_T[trained[: len(of_tokens)]] *= of_tokens  # What a row cut off has no score.
  return dataclasses.replace(example, loss_mask=mask_T)


def _with_labels(run: Any, lines: Sequence[Line]) -> list[dict[str, Any]]:
  """The lines with the built-in task, what it says of them, and whether they are wrong."""
  demos = run.data.demos
  wrong = run.benchmark.wrong_demos(demos)
  out = []
  for line, demo, w in zip(lines, demos, wrong or [None] * len(demos), strict=True):
    groups = {"task": demo.task} if demo.task else {}
    if demo.meta.get("minority"):
      groups["minority"] = True
    out.append({**line, **groups, **({} if w is None else {"wrong": bool(w)})})
  return out


def _like(**fields: Any) -> CleanedSFT:
  return CleanedSFT(like="cleaned_sft", **fields)


DEFAULTS = {
    "cleaned_sft": CleanedSFT(),
    "random_cut": _like(score="random", label="SFT on a random cut"),
    "likelihood_cut": _like(score="logp_sft", reduce="min", label="SFT, cut by likelihood"),
    "perplexity_cut": _like(score="logp_sft", reduce="mean", label="SFT, cut by perplexity"),
    "aum_cut": _like(score="aum", reduce="mean", label="SFT, cut by area under the margin"),
    "forgetting_cut": _like(score="forgetting", label="SFT, cut by forgetting"),
    "confident_cut": _like(score="confident", label="SFT, cut by confident learning"),
    "masked_sft": _like(treatment="mask", label="SFT, low-reward tokens left out"),
    "weighted_sft": _like(treatment="weight", label="SFT, weighted by exp(reward)"),
    "right_only": _like(score="oracle", label="SFT on right ones alone"),
}
