"""Plans as text: what the entry point prints, and the tables of docs/scaling.md."""

import json
import pathlib

import pytest

from dpr_jax.errors import UserError
from dpr_jax.planning import report
from dpr_jax.planning.text import plan_text


@pytest.fixture
def tables():
  from benchmarks import plan_tables

  return plan_tables


def _batch(rows, *accumulation):
  """The work of SFT on so many rows, and of DPR."""
  rollouts = {"rows": 8, "prompt": 32, "new": 16}
  updates = [{"rows": n, "tokens": tokens, "accumulation": parts}
             for n, tokens, parts in zip((rows, 8), (64, 48), accumulation)]
  return {"sft/train_step": updates[0], "dpr/rollout_step": rollouts, "dpr/train_step": updates[1]}


def _made(**changes):
  """A full plan: one program compiled, one out of memory, one not reached."""
  program = {"fits": True, "argument_bytes": 1, "temp_bytes": 1, "output_bytes": 1,
             "alias_bytes": 1, "peak_bytes": 2**30, "resident_bytes": 2**29, "flops": 1e12,
             "hbm_bytes_moved": 10, "collective_bytes": {"all-gather": 5 * 10**9},
             "collective_count": {"all-gather": 3}, "involuntary_rematerializations": 0,
             "bound_seconds": {"compute": 1.5, "hbm": 0.1, "ici": 0.2}, "compile_seconds": 1.0}
  over = {"fits": False, "compiler_message": "too much", "exhausted_bytes": 2**35,
          "resident_bytes": 0, "compile_seconds": 1.0}
  mesh = {"data": 1, "fsdp": 2, "tensor": 2}
  return {
      "topology": "v5e:2x2", "devices": 4, "hbm_bytes": 2**34, "config": "configs/x.py",
      "mesh": mesh, "fits": False, "parameters": 10**9, "attention": "splash",
      "programs": {"sft/train_step": report.not_compiled() | program,
                   "dpr/rollout_step": report.not_compiled() | over,
                   "dpr/train_step": report.not_compiled()},
      "tokens_per_second_bound": {"sft": 1234.0, "dpr": None}, "lora_rank": 8,
      "batch": _batch(8, 1, 2), "searched": True, "exhaustive": False,
      "accumulation": {"config.sft.accumulation": 1, "config.budget.accumulation": 2},
      "candidates": [{"mesh": mesh, "accumulation": [1, 2], "fits": False,
                      "peak_bytes": 3 * 2**30, "bound_seconds": None,
                      "estimated_peak_bytes": 2**30, "estimated_seconds": 1.0}],
      **changes,
  }


def _updated(tables, tmp_path, *plans) -> str:
  files, short = [tmp_path / f"{i}.json" for i in range(len(plans))], tmp_path / "plans.jsonl"
  for path, made in zip(files, plans):
    path.write_text(json.dumps(made))
  short.touch()
  if plans:
    tables.main(["summarize", *map(str, files), f"--output={short}"])
  document = tmp_path / "scaling.md"
  marks = [tables.marks(section) for section in tables.SECTIONS]
  document.write_text("before\n" + "".join(f"{b}\nold\n{e}\nbehind\n" for b, e in marks))
  for _ in range(2):  # The second time changes nothing.
    tables.main([str(short), str(document)])
  text = document.read_text()
  assert text.startswith("before\n") and "old" not in text and text.count("behind\n") == 4
  assert text.endswith(f"{marks[-1][1]}\nbehind\n")
  return text


def test_the_tables_of_plans_go_between_the_marks(tables, tmp_path):
  made = _made()
  text = _updated(tables, tmp_path, made)
  assert text.count("| x, LoRA 8 | v5e:2x2 | 1,2,2 |") == 2
  assert "| 1.5 | over, 32.0 |  |" in text and "1.50 compute" in text and "1,234" in text
  assert "warning" not in text
  shown = plan_text(made)
  assert "does not fit, 3.0 GiB\n" in shown
  assert "out of memory: too much" in shown and "not compiled" in shown
  assert "warning" not in shown
  assert "raise config.sft.accumulation and config.budget.accumulation" in shown
  (tmp_path / "bare.md").write_text("no marks")
  with pytest.raises(UserError, match="plans: begin"):
    tables.update(tmp_path / "plans.jsonl", tmp_path / "bare.md")


def test_no_plans_give_no_tables(tables, tmp_path):
  assert _updated(tables, tmp_path).count("No plans here yet") == 4


@pytest.mark.parametrize("times, wanted", [(3, "3 times"), (None, "not known")])
def test_rematerializations_are_warned_of(tables, times, wanted, tmp_path):
  made = _made()
  made["programs"]["sft/train_step"]["involuntary_rematerializations"] = times
  (warning,) = [s for s in plan_text(made).splitlines() if s.startswith("warning")]
  assert "sft/train_step" in warning and wanted in warning
  assert warning in _updated(tables, tmp_path, made)


def test_all_meshes_of_a_search_are_listed(tables, tmp_path):
  def candidate(mesh, parts, fits=None, gib=None, seconds=None):
    return {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh)), "accumulation": [parts, parts],
            "fits": fits, "peak_bytes": gib and gib * 2**30, "bound_seconds": seconds}

  made = _made(fits=True, exhaustive=True, candidates=[
      candidate((1, 4, 1), 1, False), candidate((1, 1, 4), 2, True, 7.25, 3.5),
      candidate((1, 2, 2), 2, True, 7.5, 3.0), candidate((2, 2, 1), 2), candidate((4, 1, 1), 2),
  ])
  text = _updated(tables, tmp_path, made, _made())
  begin, end = tables.marks("meshes")
  rows = text.partition(begin)[2].partition(end)[0].strip().splitlines()[2:]
  assert rows == [
      "| x, LoRA 8 | v5e:2x2 | 1, 1 |  | 1,4,1 |  |",
      "| x, LoRA 8 | v5e:2x2 | 2, 2 | **1,2,2** (7.5, 3.00); 1,1,4 (7.2, 3.50) |  | 2,2,1; 4,1,1 |",
  ]


def test_lora_stands_beside_the_full_plan_of_the_same_batch(tables, tmp_path):
  full = _made(lora_rank=0, mesh={"data": 1, "fsdp": 4, "tensor": 1},
               batch=_batch(8, 4, 4))
  full["programs"]["sft/train_step"]["peak_bytes"] = 3 * 2**30
  forced = _made(lora_rank=0, searched=False)
  other = _made(lora_rank=0, batch=_batch(16, 1, 2))
  text = _updated(tables, tmp_path, full, forced, other, _made())
  begin, end = tables.marks("lora")
  rows = text.partition(begin)[2].partition(end)[0].strip().splitlines()[2:]
  assert rows == ["| x, LoRA 8 | v5e:2x2 | 4, 4 / 1, 2 | 1,4,1 / 1,2,2 | 3.5 / 1.5 | "
                  "over, 32.0 / over, 32.0 |  /  |"]


def test_the_minimum_stands_beside_what_was_compiled(tables, tmp_path):
  least = {"gathered_forward": 4 * 10**9, "gathered_backward": 3 * 10**9,
           "gradients_reduced": 2 * 10**9}
  made = _made(lora_rank=0, searched=False,
               mesh={"data": 1, "fsdp": 4, "tensor": 1})
  made["programs"]["sft/train_step"] |= {
      "minimum_bytes": least, "collective_bytes": {"all-gather": 10**10, "all-reduce": 10**9}}
  text = _updated(tables, tmp_path, made, _made())
  begin, end = tables.marks("minimum")
  rows = text.partition(begin)[2].partition(end)[0].strip().splitlines()[2:]
  assert rows == ["| x | v5e:2x2 | 1,4,1 | sft/train_step | 8 / 1 | 4.00 | 3.00 | 2.00 | 9.00 | "
                  "11.00 | 10.00 | 1.00 |"]


def test_columns_are_those_of_the_programs_of_the_plans(tables, tmp_path):
  made = _made()
  made["programs"] = {f"{stage}/train_step": program
                      for stage, program in zip(("sft", "dpr", "spin"), made["programs"].values())}
  other = _made(config="configs/y.py", programs={"sft/train_step": report.not_compiled()})
  lines = _updated(tables, tmp_path, made, other).splitlines()
  head, _, first, second = lines[2:6]
  assert head.endswith("| fits | sft/train_step GiB | dpr/train_step GiB | spin/train_step GiB | "
                       "sft/train_step s | dpr/train_step s | spin/train_step s | sft tokens/s | "
                       "dpr tokens/s |")
  assert first.endswith("| no | 1.5 | over, 32.0 |  | 1.50 compute |  |  | 1,234 |  |")
  assert second.endswith("| no |  |  |  |  |  |  | 1,234 |  |")


def test_a_plan_replaces_its_line(tables, tmp_path):
  short = tmp_path / "plans.jsonl"
  for name, rank in (("b", 8), ("a", 0), ("b", 4)):
    (tmp_path / f"{name}.json").write_text(json.dumps(_made(lora_rank=rank)))
    tables.add([tmp_path / f"{name}.json"], short)
  assert short.read_text().startswith('{"plan":"a",')  # As benchmarks/plan_all.sh looks for it.
  assert [(line["plan"], line["lora_rank"]) for line in tables.read(short)] == [("a", 0), ("b", 4)]
  (tmp_path / "b.json").write_text(json.dumps({"config": "configs/x.py"}))
  with pytest.raises(UserError, match="b.json: not a plan"):
    tables.add([tmp_path / "b.json"], short)
  short.write_text(short.read_text() + "[]\n")
  with pytest.raises(UserError, match="plans.jsonl:3: not the summary"):
    tables.read(short)


def test_the_page_says_what_the_plans_say(tables, tmp_path):
  docs = pathlib.Path(tables.__file__).parents[1] / "docs"
  page = tmp_path / "scaling.md"
  page.write_text((docs / "scaling.md").read_text())
  tables.update(docs / "plans.jsonl", page)
  assert page.read_text() == (docs / "scaling.md").read_text()
