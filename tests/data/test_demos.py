"""Prompts that count as equal, and demonstrations that are held out."""

import random

import pytest

from dpr_jax.data.demos import Demo, check_disjoint, prompt_key, split_holdout
from dpr_jax.errors import UserError


def demo(prompt: str, response: str = "r", source: str = "") -> Demo:
  return Demo(({"role": "user", "content": prompt}, {"role": "assistant", "content": response}),
              source=source)


@pytest.mark.parametrize("seed", range(5))
def test_split_holdout(seed):
  rng = random.Random(1000 + seed)
  prompts = [f"Question {i}" for i in range(150)]
  # A third of the prompts occurs several times, spelt with other case and spacing.
  demos = [demo(p, str(i)) for i, p in enumerate(prompts)]
  for p in prompts[:50]:
    demos += [demo(f"  {p.upper()}\n"), demo(p.replace(" ", "   "), "again")][: rng.randint(1, 2)]
  rng.shuffle(demos)
  train, heldout = split_holdout(demos, 40, seed)
  check_disjoint(train, heldout)
  assert 38 <= len(heldout) <= 40 and len(train) + len(heldout) == len(demos)
  position = {id(d): i for i, d in enumerate(demos)}
  places = [position[id(d)] for d in train]
  assert places == sorted(places)  # file order is kept
  assert not {prompt_key(d) for d in train} & {prompt_key(d) for d in heldout}
  again = demos[:]
  rng.shuffle(again)
  _, reheld = split_holdout(again, 40, seed)
  assert {id(d) for d in reheld} == {id(d) for d in heldout}  # whatever the order of the file
  _, other = split_holdout(demos, 40, seed + 1)
  assert {id(d) for d in other} != {id(d) for d in heldout}
  # More held out with the same seed begins with what was held out before, duplicates or not.
  for more in (41, 80, 130, 160):
    _, larger = split_holdout(demos, more, seed)
    assert len(larger) > 40 or more == 41
    assert [id(d) for d in larger[: len(heldout)]] == [id(d) for d in heldout]


def test_split_holdout_edges():
  demos = [demo("a"), demo("a "), demo("A"), demo("b")]
  assert split_holdout(demos, 0, 0) == (demos, [])
  train, heldout = split_holdout(demos, 1, 0)
  assert [prompt_key(d) for d in heldout] == ["b"] and len(train) == 3
  for holdout in (-1, 4, 9):
    with pytest.raises(UserError, match=f"^holdout={holdout} must be at least 0 and below 4"):
      split_holdout(demos, holdout, 0)
  with pytest.raises(UserError, match="^holdout=2 is smaller than the 3 demonstrations that"):
    split_holdout(demos[:3], 2, 0)


def test_check_disjoint_names_prompt_and_both_places():
  train = [demo("What is 1 + 1?", source="t.jsonl:4"), demo("other", source="t.jsonl:5")]
  check_disjoint(train, [demo("What is 1 + 2?")])
  with pytest.raises(UserError, match=r"h.jsonl:9: .*'what is 1 \+ 1\?'.*t.jsonl:4"):
    check_disjoint(train, [demo("what  is 1 + 1?\n", source="h.jsonl:9")])
  # Compatibility forms of a character count as equal (full-width digits).
  with pytest.raises(UserError):
    check_disjoint(train, [demo("What is \uff11 + 1?")])


def test_prompt_key_looks_at_the_first_user_turn_only():
  dialogue = Demo(({"role": "system", "content": "Be brief."}, *demo("Who?").messages,
                   *demo("Why?").messages))
  assert prompt_key(dialogue) == prompt_key(demo("who? "))
