"""Does the reward find a wrong token? One token of a held-out demonstration is replaced.

The wrong token is of the same kind as the right one and about as frequent as others of its kind, so
that its form alone does not give it away. All rewards of the package are compared that log-probs
under sft and ref give: the baseline-relative one, log pi_sft, the endogenous one.

  auc             P(reward of a wrong token < reward of a right one), a tie counts half. The right
                  ones are all tokens before the wrong one in its answer: they are as
                  demonstrated, and so is what they follow. Tokens after the wrong one are left out,
                  because each is conditioned on it, and so is EOS with them.
  lowest          share of answers in which the wrong token's reward is strictly the lowest up to
                  there; of those in which a token precedes it.
  chance          what `lowest` would be at random: the mean of 1 / (tokens up to there).
  auc_gain        auc of the baseline-relative reward minus that of this one, on the same answers.
  below_original  share in which the wrong token's reward is below that of the token it replaced, in
                  the same place. The endogenous reward of both includes the value of what follows.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.config.fields import kinds, title_of
from dpr_jax.data.demos import Demo
from dpr_jax.data.text_ids import text_of_ids, token_texts
from dpr_jax.evaluation.auc import auc_difference, auc_interval
from dpr_jax.evaluation.benchmarks.base import Benchmark
from dpr_jax.evaluation.metrics import GROUPS
from dpr_jax.evaluation.responses import response_text
from dpr_jax.evaluation.statistics import interval
from dpr_jax.evaluation.token_scores import TokenScores
from dpr_jax.rewards.base import Scores, apply_reward, needs

# What is known of a demonstration under sft and ref, and so what a reward may need to be judged.
_KNOWN = {"sft_logp", "sft_logsumexp", "ref_logp", "mask"}
MAIN = "baseline_relative"  # the reward that the others are compared with.
KINDS = ("all", *GROUPS)  # of answers: all of them, and those of some groups of prompts.


def judged_rewards() -> dict[str, Any]:
  """Kind -> reward, of all rewards of the package that can be computed here, the main one first."""
  found = {kind: cls() for kind, cls in kinds("dpr_jax.rewards").items()}
  found = {kind: r for kind, r in found.items() if needs(r) <= _KNOWN}
  return {MAIN: found.pop(MAIN), **dict(sorted(found.items(), reverse=True))}


def titles() -> dict[str, str]:
  """How a report calls the rewards and the kinds of answers in what `summarize` returns."""
  return {
      **{kind: title_of(reward) for kind, reward in judged_rewards().items()},
      "all": "all answers",
      **GROUPS,
  }


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A demonstrated response with one wrong token."""

  index: int  # of its demonstration.
  position: int  # of the wrong token in the response.
  tokens: np.ndarray  # int32 [T], as demonstrated but for that one.
  original: int  # the token that was replaced.


def corrupt_responses(
    demos: Sequence[Demo],
    responses: Sequence[np.ndarray],
    tokenizer: Any,
    stop_ids: Sequence[int],
    benchmark: Benchmark,
    seed: int = 0,
) -> list[Corruption]:
  """Replaces one token of each response, at a uniformly random place, by a wrong one.

  The other token is sampled by its frequency in the responses to the same task (of a file, in all
  of them), among those of the same kind of characters where one is wrong there, else among all.
  Wrong is what the benchmark says (`Benchmark.is_wrong`): what the checker of a built-in task
  refuses; in a file, what differs from the response after the normalization of SQuAD. With
  `Benchmark.corrupts_numbers` a token with a digit is replaced, where there is one. Special tokens
  stay. A response of which no token can be made wrong is left out.

  Args:
    demos, responses: demonstrations and their token ids, int32 [T_i], EOS included.
    benchmark: that judges the run's responses.
    seed: of the choices; the i-th depends on the seed, i and the pool only.
  """
  special = {*stop_ids, *tokenizer.all_special_ids}
  pools: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for demo, tokens in zip(demos, responses, strict=True):
    pools[demo.task].update(int(t) for t in tokens if int(t) not in special)
  known = sorted({t for pool in pools.values() for t in pool})
  kinds_of = {t: _kind(text_of_ids([t], tokenizer)) for t in known}
  out = []
  for i, (demo, tokens) in enumerate(zip(demos, responses)):
    rng = np.random.default_rng([seed, i])
    places = [t for t, token in enumerate(tokens) if int(token) not in special]
    numbers = [t for t in places if kinds_of[int(tokens[t])][1] == "digit"]
    places = numbers if numbers and benchmark.corrupts_numbers else places
    read = lambda ids: response_text(tokenizer, ids, int(ids[-1]) in stop_ids, stop_ids)
    wrong = lambda ids, demo=demo, read=read: benchmark.is_wrong(demo, read(ids))
    found = _first_wrong(tokens, places, pools[demo.task], kinds_of, rng, wrong)
    if found is not None:
      out.append(Corruption(i, found[0], found[1], int(tokens[found[0]])))
  return out


def _kind(text: str) -> tuple[bool, str]:
  """What must be alike in a token and its replacement: a leading space, and the characters."""
  body = text.strip()
  if any(c.isdigit() for c in body):
    return text[:1].isspace(), "digit"
  if body.isalpha():
    return text[:1].isspace(), "upper" if body.isupper() else "lower" if body.islower() else "word"
  return text[:1].isspace(), "other"


def _first_wrong(tokens, places, pool, kinds, rng, wrong) -> tuple[int, np.ndarray] | None:
  """(place, corrupted tokens) of the first choice that is wrong, None if there is none."""
  for t in rng.permutation(np.asarray(places, np.int64)):
    original = int(tokens[t])
    others = sorted(c for c in pool if c != original)
    alike = [c for c in others if kinds[c] == kinds[original]]
    for group in (alike, [c for c in others if kinds[c] != kinds[original]]):
      if not group:
        continue
      count = np.array([pool[c] for c in group], np.float64)
      order = rng.choice(len(group), len(group), replace=False, p=count / count.sum())
      for c in order:
        changed = np.array(tokens, np.int32)
        changed[t] = group[c]
        if wrong(changed):
          return int(t), changed
  return None


def token_rewards(scores: Sequence[TokenScores]) -> dict[str, list[np.ndarray]]:
  """Kind of a reward -> its values for each response, nats, float32 [T_i]."""
  length = max((len(s.logp_sft) for s in scores), default=1)
  padded = np.zeros((4, len(scores), length), np.float32)
  for i, s in enumerate(scores):
    values = (s.logp_sft, s.logp_ref, s.logsumexp_sft, np.ones_like(s.logp_sft))
    padded[:, i, : len(s.logp_sft)] = values
  sft, ref, logsumexp, mask = padded
  known = Scores(sft_logp=sft, ref_logp=ref, sft_logsumexp=logsumexp, mask=mask)
  found = {kind: apply_reward(reward, known) for kind, reward in judged_rewards().items()}
  return {
      kind: [row[: len(s.logp_sft)] for row, s in zip(np.asarray(values), scores)]
      for kind, values in found.items()
  }


def corruption_records(
    demos: Sequence[Demo], corruptions: Sequence[Corruption], wrong: Sequence[TokenScores],
    right: Sequence[TokenScores], tokenizer: Any, benchmark: Benchmark,
) -> list[dict[str, Any]]:
  """One line of samples/corruption.jsonl for each corruption.

  Args:
    wrong, right: scores of the corrupted and of the demonstrated responses, in that order.
  """
  rewards, originals = token_rewards(wrong), token_rewards(right)
  records = []
  for i, c in enumerate(corruptions):
    demo = demos[c.index]
    records.append({
        "prompt": demo.prompt[-1]["content"],
        "groups": list(benchmark.groups(demo)),
        "answer": demo.response,
        "tokens": token_texts(c.tokens, tokenizer),
        "token_ids": [int(t) for t in c.tokens],
        "position": c.position,
        "original": text_of_ids([c.original], tokenizer),
        "rewards": {name: [round(float(x), 6) for x in of[i]] for name, of in rewards.items()},
        "original_rewards": {
            name: round(float(of[i][c.position]), 6) for name, of in originals.items()
        },
    })
  return records


def summarize(per_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Records of each seed -> kind of task -> reward -> metric -> {mean, ci95, n}.

  A kind without records is left out. Beside the rewards, of which the first is the main one, stands
  `chance`, of the metric `lowest`.
  """
  out = {}
  for kind in KINDS:
    counts = lambda r, kind=kind: kind == "all" or kind in r["groups"]
    chosen = [list(filter(counts, records)) for records in per_seed]
    if not all(chosen):
      continue
    later = [[r for r in records if r["position"]] for records in chosen]
    out[kind] = {name: _summary(chosen, later, name) for name in chosen[0][0]["rewards"]}
    if all(later):
      chances = [1 / (r["position"] + 1) for records in later for r in records]
      out[kind]["chance"] = float(np.mean(chances))
  return out


def _summary(chosen, later, name: str) -> dict[str, Any]:
  at = lambda r, name=name: r["rewards"][name][r["position"]]
  before = lambda r, name=name: r["rewards"][name][: r["position"]]

  def groups(name):
    pair = lambda r: (np.array([at(r, name)]), np.array(before(r, name)))
    return [[pair(r) for r in records] for records in chosen]

  out = {}
  if len({len(records) for records in chosen}) == 1:
    out["auc"] = auc_interval(groups(name))
    if name != MAIN:
      out["auc_gain"] = auc_difference(groups(MAIN), groups(name))
  if all(later):
    lowest = lambda r: float(at(r) < min(before(r)))
    out["lowest"] = interval([np.array([lowest(r) for r in records]) for records in later])
  below = lambda r: float(at(r) < r["original_rewards"][name])
  out["below_original"] = interval([np.array([below(r) for r in records]) for records in chosen])
  return out
