"""The responses that a report shows: every system's, to a few prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpr_jax.report import tables
from dpr_jax.report.render import count, visible
from dpr_jax.report.tables import Results

MAX_SAMPLES = 12  # prompts whose responses are shown.
MAX_CHARACTERS = 800  # shown of a response.


def samples_view(
  systems: Mapping[str, Sequence[Mapping[str, Any]]], results: Results
) -> dict[str, Any] | None:
  """The first prompts of each task in turn, never chosen; None without responses.

  Args:
    systems: the responses of each system, as its file under samples/ has them.
  """
  if not systems:
    return None
  known = results["labels"]
  order = [n for n in known if n in systems] + sorted(set(systems) - set(known))
  modes = {r.get("mode") for lines in systems.values() for r in lines}
  mode = "sampled" if "sampled" in modes else "greedy" if "greedy" in modes else None
  prompts: dict[tuple[str, str], dict[str, Any]] = {}
  for name in order:
    for r in systems[name]:
      if mode and r.get("mode") != mode:
        continue
      key = (str(r.get("task") or ""), str(r["prompt"]))
      entry = prompts.setdefault(key, {"answer": r.get("answer"), "responses": {}})
      entry["responses"].setdefault(name, r)  # the first, where a prompt occurs twice.
  chosen = _in_turn(list(prompts))[:MAX_SAMPLES]
  return {
    "mode": mode or "",
    "total": count(len(prompts)),
    "prompts": [
      {
        "task": visible(key[0]),
        "prompt": cut(key[1]),
        "answer": "" if prompts[key]["answer"] is None else cut(prompts[key]["answer"]),
        "responses": [
          {"system": tables.label(results, name), **_response(prompts[key]["responses"][name])}
          for name in order if name in prompts[key]["responses"]
        ],
      }
      for key in chosen
    ],
  }


def _in_turn(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """The first key of each task, then the second of each, ..."""
  seen: dict[str, int] = {}
  ranked = []
  for i, key in enumerate(keys):
    seen[key[0]] = seen.get(key[0], 0) + 1
    ranked.append((seen[key[0]], i, key))
  return [key for _, _, key in sorted(ranked)]


def _response(record: Mapping[str, Any]) -> dict[str, Any]:
  correct = record.get("correct")
  return {
    "text": cut(record["response"]),
    "correct": correct if isinstance(correct, bool) else None,
    "cut": record.get("hit_eos") is False,
  }


def cut(text: Any) -> str:
  text = str(text)
  more = len(text) - MAX_CHARACTERS
  shown = visible(text[:MAX_CHARACTERS])
  return f"{shown} … ({more:,} more characters)" if more > 0 else shown
