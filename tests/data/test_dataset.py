"""The data section of a config -> what a run trains on."""

import json
import re

import pytest

from dpr_jax.config.sections import DataSection
from dpr_jax.data.dataset import build_dataset
from dpr_jax.data.tasks import SHORT_TASKS, make_demos
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer


def test_the_section_says_what_is_carried_and_dropped(tmp_path):
  ask = lambda i: {"role": "user", "content": f"q{i}"}
  reply = lambda i, **fields: {"role": "assistant", "content": f"r{i}", **fields}
  records = [{"messages": [ask(i), reply(i)], "style": "plain"} for i in range(8)]
  records.append({"messages": [reply(8), ask(8), reply(9)]})  # Begins with the assistant.
  records.append({"messages": [ask(9), reply(9, weight=0)]})
  (tmp_path / "demos").mkdir()
  for i, half in enumerate((records[:5], records[5:])):
    (tmp_path / "demos" / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in half))
  section = dict(demos=str(tmp_path / "demos"), holdout=2, row_length=32)
  tokenizer = byte_tokenizer()
  with pytest.raises(UserError, match=r"0\.jsonl:1: field 'style' is not known"):
    build_dataset(DataSection(**section), tokenizer, 0)
  with pytest.raises(UserError, match=r"1\.jsonl:4: roles out of order"):
    build_dataset(DataSection(**section, extra_fields=("style",)), tokenizer, 0)
  section |= dict(extra_fields=("style",), on_disorder="drop")
  data = build_dataset(DataSection(**section), tokenizer, 0)
  found = data.summary["demos"] + data.summary["heldout"]
  assert data.summary["dropped_disordered"] == 1 and found in (8, 9)
  # Nothing imitates the answer of weight 0: not SFT, nor a method on the prompts of demonstrations.
  assert data.summary["trained_tokens"] == 3 * data.summary["prompts"]
  assert not any(d.messages[0]["content"] == "q9"
                 for d in (*data.prompts.demos, *data.heldout.demos))


def test_built_in_tasks_are_made_as_the_section_says():
  section = DataSection(
    tasks=("sort", "edits:0.1"), num_demos=200, holdout=20, row_length=96, corrupt=0.2,
    corruption="slip", minority=0.1,
  )
  data = build_dataset(section, byte_tokenizer(), 3)
  found = [(d.task, d.meta["corrupted"], d.meta["minority"]) for d in data.demos]
  assert [sum(column) for column in zip(*((t == "edits", c, m) for t, c, m in found))] == [
    20, 40, 20]
  assert data.demos == make_demos(
    section.tasks, 200, 3, corrupt=0.2, corruption="slip", minority=0.1)
  # Held-out demonstrations are right, of all tasks alike, and as often in the rare style.
  held = data.heldout.demos
  assert [d.task for d in held] == ["sort", "edits"] * 10
  assert sum(d.meta["minority"] for d in held) == 2 and not any(d.meta["corrupted"] for d in held)
  assert data.summary["tasks"] == ["sort", "edits:0.1"]


@pytest.mark.parametrize("tasks, benchmark", [
  ((), "tasks"), (("sort", "add:0.1"), "tasks"), (("sort", "bubble:0.1"), "long_tasks"),
])
def test_long_tasks_have_a_benchmark_of_their_own(tasks, benchmark):
  section = DataSection(tasks=tasks, num_demos=60, holdout=20, row_length=96)
  data = build_dataset(section, byte_tokenizer(), 0)
  assert data.benchmark == benchmark
  if not tasks:
    assert {d.task for d in data.demos} == set(SHORT_TASKS)


@pytest.mark.parametrize("fields, message", [
  ({"tasks": ("sort", "dance")}, "task 'dance' is unknown; known: add, reverse"),
  ({"tasks": ("sort:2", "add")}, "task 'sort:2': the share must be a number above 0"),
  ({"tasks": ("sort", "edits"), "corrupt": 0.1, "corruption": "step"},
   "task sort: corruption='step' needs a task whose answers have steps"),
  ({"tasks": ("count",), "corrupt": 0.1, "corruption": "truncated"},
   "task count: corruption='truncated' makes none of its answers wrong"),
])
def test_what_cannot_be_made_is_refused_by_name(fields, message):
  section = DataSection(num_demos=20, holdout=4, **fields)
  with pytest.raises(UserError, match=f"^{re.escape(message)}"):
    build_dataset(section, byte_tokenizer(), 0)
