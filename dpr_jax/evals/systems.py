"""The systems that a run compares, and their evaluation on the held-out prompts.

A system is a way to answer: one trained model, or a control made of two without training.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dpr_jax.data.loader import Prompts
from dpr_jax.evals.resampling import resample
from dpr_jax.evals.responses import respond, response_text
from dpr_jax.evals.verifiers import get_verifier
from dpr_jax.rollout.sampling import Sampling

MODES = ("sampled", "greedy")


@dataclasses.dataclass(frozen=True)
class System:
  """How a system answers: logits = sum_i weights[i] * logits of members[i].

  With several candidates: one of so many of the first member's, by `evals.resampling` against the
  other members.
  """

  name: str
  members: tuple[str, ...]  # names of parameter sets: base, ref, sft, dpr, ...
  weights: tuple[float, ...] = (1.0,)
  temperature: float = 1.0  # of the sampled mode.
  modes: tuple[str, ...] = MODES
  candidates: int = 1
  alpha: float = 0.0  # of resampling the candidates.


def controls(
    names: Sequence[str],
    alpha: float,
    temperature: float,
    refs: Sequence[str] = ("ref",),
    candidates: int = 16,
) -> list[System]:
  """Controls that need no training.

  Args:
    names: of contrastive, weight_extrapolation, low_temperature and resampled.
    alpha: extrapolation strength; contrastive decoding at 1 / beta is the optimum of DPR with
      returns per token, resampled that of whole responses, for the plain reward (no transforms).
    temperature: of low_temperature; its greedy mode would be that of sft.
    refs: parameter sets of the reference; of several, decoding takes the geometric mean.
    candidates: responses that resampled chooses from.
  """
  known = {
      "contrastive": System(
          "contrastive", ("sft", *refs), (1.0 + alpha, *[-alpha / len(refs)] * len(refs))
      ),
      "weight_extrapolation": System("weight_extrapolation", ("extrapolated",)),
      "low_temperature": System(
          "low_temperature", ("sft",), temperature=temperature, modes=("sampled",)
      ),
      "resampled": System(
          "resampled", ("sft", *refs), modes=("sampled",), candidates=candidates, alpha=alpha
      ),
  }
  return [known[name] for name in names]


def evaluate_system(
    system: System,
    model: Any,
    load: Callable[[str], Any],
    prompts: Prompts,
    tokenizer: Any,
    *,
    verifier: str,
    rng: jax.Array,
    seed: int,
    stop_ids: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    chunk_size: int = 128,
    ensemble: str = "",
    **decoding: Any,
) -> list[dict[str, Any]]:
  """One record a prompt and mode, for samples/SYSTEM.jsonl.

  Args:
    load: name of a parameter set -> its variables.
    prompts: held-out prompts with their demonstrations.
    rng: key of the sampled mode; the same for all systems, so that they share their noise.
    mesh, batch_size, decoding: keywords of `respond`.
    chunk_size, ensemble: of scoring, see `evals.scoring`; where candidates are resampled.
  """
  verify = get_verifier(verifier)
  members = tuple(load(name) for name in system.members)
  records = []
  for mode in system.modes:
    sampling = Sampling(temperature=system.temperature if mode == "sampled" else 0.0)
    extra = [{} for _ in prompts.demos]
    responses = respond(
        model,
        members if system.candidates == 1 else members[:1],
        prompts.tokens,
        rng,
        weights=system.weights,
        sampling=sampling,
        samples_per_prompt=system.candidates,
        stop_ids=stop_ids,
        mesh=mesh,
        batch_size=batch_size,
        **decoding,
    )
    if system.candidates > 1:
      responses, effective = resample(
          model,
          members[0],
          members[1:] if ensemble else members[1],
          prompts.tokens,
          responses,
          alpha=system.alpha,
          seed=seed,
          ensemble=ensemble,
          mesh=mesh,
          batch_size=batch_size,
          chunk_size=chunk_size,
      )
      extra = [{"effective_samples": float(x)} for x in effective]
    for demo, response, more in zip(prompts.demos, responses, extra, strict=True):
      text = response_text(tokenizer, response.tokens, response.hit_eos, stop_ids)
      scores = dict(verify(demo, text))
      records.append({
          "prompt": demo.prompt[-1]["content"],
          "task": demo.task,
          "answer": demo.answer,
          "mode": mode,
          "response": text,
          "correct": bool(scores["accuracy"]),
          "scores": scores,
          "token_ids": [int(t) for t in response.tokens],
          "length": len(response.tokens),
          "hit_eos": response.hit_eos,
          "seed": seed,
          **more,
      })
  return records


def system_file(samples: pathlib.Path, name: str) -> pathlib.Path:
  return samples / f"{name}.jsonl"
