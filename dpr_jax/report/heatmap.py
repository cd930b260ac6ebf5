"""Token-reward heatmaps: each token on a diverging scale, its value in reach.

Blue: pi_sft finds the token likelier than pi_ref; orange: less likely. The scale is
symmetric, so that no colour means no reward.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpr_jax.paths import as_path, write_atomically
from dpr_jax.report.render import finite, number, render, visible

MAX_TOKENS = 1_000  # shown of one response; a page must stay readable.
_SATURATION = 98  # percentile of |reward| from which on the colour no longer deepens.
_OPACITY = 0.62  # of the deepest colour: text stays readable on it, in light and dark.
POSITIVE, NEGATIVE = (37, 99, 235), (234, 106, 18)  # red, green, blue.


def limit(rows: Iterable[Mapping[str, Any]]) -> float:
  """The reward, in nats, at which the colour is deepest; the same for all rows of a page."""
  sizes = [abs(r) for row in rows for r in row.get("token_rewards") or () if finite(r)]
  return max(float(np.percentile(sizes, _SATURATION)), 1e-6) if sizes else 1.0


def colour(reward: float, scale: float) -> str:
  """CSS colour of a token reward, at `scale` nats the deepest."""
  red, green, blue = POSITIVE if reward > 0 else NEGATIVE
  return f"rgba({red},{green},{blue},{_OPACITY * min(1.0, abs(reward) / scale):.3f})"


def heatmap_view(rows: Iterable[Mapping[str, Any]], scale: float) -> list[dict[str, Any]]:
  """What the template shows of each line that `score` wrote; lines without rewards are left out."""
  views = []
  for row in rows:
    tokens, rewards = row.get("tokens"), row.get("token_rewards")
    if not tokens or not rewards or len(tokens) != len(rewards):
      continue
    known = [r for r in rewards if finite(r)]
    views.append({
      "prompt": visible(_prompt(row)),
      "tokens": [_token(row, i, scale) for i in range(min(len(tokens), MAX_TOKENS))],
      "hidden": max(0, len(tokens) - MAX_TOKENS),
      "count": len(tokens),
      "reward": number(row["reward"] if finite(row.get("reward")) else sum(known), 2, sign=True),
      "correct": row.get("correct"),
    })
  return views


def legend(scale: float) -> dict[str, Any]:
  """The colour bar below the heatmaps."""
  low, high = colour(-scale, scale), colour(scale, scale)
  return {
    "gradient": f"linear-gradient(90deg,{low},transparent,{high})",
    "low": number(-scale, 2),
    "high": number(scale, 2, sign=True),
  }


def heatmap_page(rows: Iterable[Mapping[str, Any]], title: str) -> str:
  """A page of heatmaps that needs no other file and no network, as HTML.

  Args:
    rows: lines as `dpr_jax.score` writes them: prompt or messages, response, tokens,
      token_rewards, logp_sft, logp_ref (nats, one per token), reward (their sum).
    title: heading of the page.
  """
  rows = list(rows)
  number = len(heatmap_view(rows, 1.0))
  return heatmap_sections(
      {"Scored responses": rows}, title, f"{number} responses scored token by token."
  )


def heatmap_sections(
    sections: Mapping[str, Sequence[Mapping[str, Any]]], title: str, lead: str
) -> str:
  """Such a page with several lists of rows, by their headings, on one scale.

  Args:
    lead: the sentence below the title.
  """
  scale = limit(row for rows in sections.values() for row in rows)
  shown = [{"id": f"scored{i or ''}", "name": name, "rows": heatmap_view(rows, scale)}
           for i, (name, rows) in enumerate(sections.items())]
  return render(title=title, lead=lead, heatmaps=shown, legend=legend(scale))


def write_heatmap(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike, title: str) -> None:
  """Writes `heatmap_page` to `path`; its folder is made."""
  write_atomically(as_path(path), heatmap_page(rows, title))


def _prompt(row: Mapping[str, Any]) -> str:
  if row.get("prompt") is not None:
    return str(row["prompt"])
  messages: Sequence[Any] = row.get("messages") or ()
  shown = [m for m in messages if isinstance(m, Mapping)]
  if shown and shown[-1].get("role") == "assistant":
    shown = shown[:-1]  # The response itself.
  if len(shown) == 1:
    return str(shown[0].get("content", ""))
  return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in shown)


def _token(row: Mapping[str, Any], i: int, scale: float) -> dict[str, Any]:
  text, reward = str(row["tokens"][i]), row["token_rewards"][i]
  shown = visible(text, spaces=True) or "∅"
  title = f"{shown}  reward {number(reward, 3, sign=True)}"
  for key, name in (("logp_sft", "log p sft"), ("logp_ref", "log p ref")):
    values = row.get(key) or ()
    if i < len(values):
      title += f", {name} {number(values[i], 3)}"
  return {
    "text": shown,
    "blank": not text.strip(),
    "breaks": text.endswith("\n"),
    "value": number(reward, 2, sign=True),
    "colour": colour(reward, scale) if finite(reward) else "transparent",
    "unknown": not finite(reward),
    "title": title,
  }
