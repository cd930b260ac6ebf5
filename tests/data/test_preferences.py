"""Every layout of preference data, what is wrong with a pair, every complaint about a record."""

import collections
import gzip
import json
import pathlib

import pytest

from dpr_jax.data.preferences import read_pairs
from dpr_jax.errors import UserError

HH_RLHF = pathlib.Path("/work/shared/data/hh_rlhf/harmless-base_test.jsonl.gz")
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Who?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Me.", "You."))
MORE = {"role": "user", "content": "Why?\n\nTell me: Human: or not?"}
DIALOGUE = ("\n\nHuman: Who?\n\nAssistant: Me."
            "\n\nHuman: Why?\n\nTell me: Human: or not?\n\nAssistant:")

# (record, prompt, chosen, rejected)
LAYOUTS = [
    ({"chosen": "\n\nHuman: Who?\n\nAssistant: Me.",
      "rejected": "\n\nHuman: Who?\n\nAssistant:  You.\n"}, [ASK], GOOD, BAD),
    ({"chosen": f"{DIALOGUE} Me.", "rejected": f"{DIALOGUE} You."}, [ASK, GOOD, MORE], GOOD, BAD),
    ({"prompt": DIALOGUE, "chosen": " Me.", "rejected": " You."}, [ASK, GOOD, MORE], GOOD, BAD),
    ({"chosen": "Human: Who?\n\nAssistant: Me.", "rejected": "Human: Who?\n\nAssistant: You.",
      "system": "Be brief."}, [SYSTEM, ASK], GOOD, BAD),
    ({"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, [ASK], GOOD, BAD),
    ({"prompt": "Who?", "chosen": [GOOD], "rejected": [BAD], "score_chosen": 3}, [ASK], GOOD, BAD),
    ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, ASK], GOOD, BAD),
    ({"prompt": [ASK], "chosen": "Me.", "rejected": "You."}, [ASK], GOOD, BAD),
    ({"prompt": None, "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
     [SYSTEM, ASK], GOOD, BAD),
    ({"prompt": "Who?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
     [ASK], GOOD, BAD),
]


def write(path, *records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_a_pair_is_two_responses_to_one_prompt(tmp_path, number):
  record, prompt, good, bad = LAYOUTS[number]
  (pair,) = read_pairs(write(tmp_path / "pairs.jsonl", record))
  assert pair.problem == "" and pair.chosen.source == f"{tmp_path}/pairs.jsonl:1"
  for demo, response in ((pair.chosen, good), (pair.rejected, bad)):
    assert list(demo.messages) == [*prompt, response]


def test_layouts_may_be_mixed_and_the_first_few_are_taken(tmp_path):
  path = tmp_path / "pairs.jsonl.gz"
  path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r, *_ in LAYOUTS).encode()))
  assert len(read_pairs(path)) == len(LAYOUTS)
  assert [p.chosen.response for p in read_pairs(path, 3)] == ["Me."] * 3


@pytest.mark.parametrize("chosen, rejected, problem", [
    ("Human: a\n\nAssistant: b", "Human: A\n\nAssistant: c", "the dialogues differ"),
    ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: b\n\nHuman: a\n\nAssistant: c",
     "the dialogues differ"),
    ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: b ", "are the same"),
    ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: ", "empty turn"),
    ("Human: a\n\nAssistant: b", "Human: a", "the dialogues differ|roles out of order"),
    ("Human: \n\nAssistant: b", "Human: \n\nAssistant: c", "empty turn"),
    ("Human: a\n\nAssistant: x\n\nAssistant: b", "Human: a\n\nAssistant: x\n\nAssistant: c",
     "roles out of order"),
])
def test_what_is_no_pair_is_kept_with_its_problem(tmp_path, chosen, rejected, problem):
  given = {"chosen": chosen, "rejected": rejected}
  swapped = {"chosen": rejected, "rejected": chosen}
  for pair in read_pairs(write(tmp_path / "pairs.jsonl", given, swapped)):
    assert any(p in pair.problem for p in problem.split("|"))


@pytest.mark.parametrize("record, complaint", [
    ({"chosen": "Human: a\n\nAssistant: b"}, "field 'rejected' is missing"),
    ({"prompt": "a", "response": "b"}, "field 'chosen' is missing"),
    ({"chosen": "a", "rejected": "b"}, "chosen: expected a dialogue that begins with 'Human:'"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "field 'chosen' must be text or a list"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "field 'prompt' must be text, got a number"),
    ({"chosen": "Assistant: a", "rejected": "Assistant: b"}, "'chosen' has no turn of the user"),
    ({"prompt": "Wer?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
     "'prompt' is not the first user turn"),
    ({"prompt": "Who?", "chosen": [], "rejected": [BAD]}, "must be a non-empty list of turns"),
    ({"prompt": "Who?", "chosen": [GOOD], "rejected": [{"role": "judge", "content": "x"}]},
     "rejected: .*unknown role 'judge'"),
    ({"prompt": "Who?", "chosen": "a\ud800", "rejected": "b"}, "lone surrogate"),
], ids=range(10))
def test_a_record_of_another_format_is_named_by_its_line(tmp_path, record, complaint):
  path = write(tmp_path / "pairs.jsonl", LAYOUTS[0][0], record)
  with pytest.raises(UserError, match=f"pairs.jsonl:2.*{complaint}"):
    read_pairs(path)


@pytest.mark.skipif(not HH_RLHF.exists(), reason="HH-RLHF is not there")
def test_the_broken_records_of_hh_rlhf_are_found():
  pairs = read_pairs(HH_RLHF)
  assert len(pairs) == 2312
  broken = collections.Counter(pair.problem for pair in pairs if pair.problem)
  assert sorted(broken.values()) == [4, 4, 5]
