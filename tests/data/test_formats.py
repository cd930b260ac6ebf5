"""Every layout of a demonstration file, and every complaint about one."""

import dataclasses
import json
import pathlib

import pytest

from dpr_jax.config.sections import DataSection
from dpr_jax.data.demos import check_disjoint, split_holdout
from dpr_jax.data.formats import FORMATS, read_demos, read_prompts
from dpr_jax.data.records import iter_records
from dpr_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Who?"}
REPLY = {"role": "assistant", "content": "Me."}
MORE = {"role": "user", "content": "Why?"}
END = {"role": "assistant", "content": "Because."}

# (format, record, the messages it stands for, its reference answer)
LAYOUTS = [
  ("messages", {"messages": [SYSTEM, ASK, REPLY]}, [SYSTEM, ASK, REPLY], "Me."),
  ("messages", {"messages": [ASK, REPLY, MORE, END], "answer": "42"}, [ASK, REPLY, MORE, END],
   "42"),
  ("messages",
   {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"},
                                              {"type": "text", "text": "o?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Me."}]}]},
   [ASK, REPLY], "Me."),
  ("sharegpt",
   {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"},
                      {"from": "gpt", "value": "Me."}]}, [SYSTEM, ASK, REPLY], "Me."),
  ("sharegpt",
   {"conversations": [{"role": "user", "content": "Who?"},
                      {"role": "assistant", "content": "Me."}], "system": "Be brief."},
   [SYSTEM, ASK, REPLY], "Me."),
  ("gsm8k", {"question": "Who?", "answer": "6*7 = <<6*7=42>>42 <<a=b>>now\n#### 42"},
   [ASK, {"role": "assistant", "content": "6*7 = 42 <<a=b>>now\n#### 42"}], "42"),
  ("question_answer", {"question": "Who?", "answer": "Me."}, [ASK, REPLY], "Me."),
  ("question_answer", {"question": "Who?", "response": "Me.", "system_prompt": "Be brief."},
   [SYSTEM, ASK, REPLY], "Me."),
  ("alpaca", {"instruction": "Who?", "input": "", "output": "Me."}, [ASK, REPLY], "Me."),
  ("alpaca", {"instruction": "Who?", "output": "Me."}, [ASK, REPLY], "Me."),
  ("alpaca", {"instruction": "Who?", "context": "The king", "response": "Me.", "category": "open"},
   [{"role": "user", "content": "Who?\n\nThe king"}, REPLY], "Me."),
  ("alpaca", {"instruction": "Who?", "input": "The king", "output": "Me."},
   [{"role": "user", "content": "Who?\n\nThe king"}, REPLY], "Me."),
  ("alpaca",
   {"instruction": "Why?", "input": None, "output": "Because.", "system": "Be brief.",
    "history": [["Who?", "Me."]]}, [SYSTEM, ASK, REPLY, MORE, END], "Because."),
  ("prompt_response", {"prompt": "Who?", "response": "Me."}, [ASK, REPLY], "Me."),
  ("prompt_response", {"prompt": "Who?", "completion": "Me."}, [ASK, REPLY], "Me."),
  ("prompt_response", {"prompt": "Who?", "answer": "Me."}, [ASK, REPLY], "Me."),
  ("prompt_response", {"prompt": "Who?", "response": "Me.", "answer": "42"}, [ASK, REPLY], "42"),
]


def write_jsonl(path: pathlib.Path, records) -> pathlib.Path:
  path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
  return path


def write_json(path: pathlib.Path, records) -> pathlib.Path:
  path.write_text(json.dumps(records, indent=1), encoding="utf-8")
  return path


def write_parquet(path: pathlib.Path, records) -> pathlib.Path:
  table = pytest.importorskip("pyarrow").Table.from_pylist(records)
  pytest.importorskip("pyarrow.parquet").write_table(table, path)
  return path


WRITERS = {"d.jsonl": write_jsonl, "d.json": write_json, "d.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("format, record, messages, answer", LAYOUTS)
def test_every_layout_in_every_container(tmp_path, name, format, record, messages, answer):
  path = WRITERS[name](tmp_path / name, [record, record])
  for asked in (format, "auto"):
    found = read_demos(path, asked)
    assert (found.format, found.dropped_empty, len(found.demos)) == (format, 0, 2)
    for i, demo in enumerate(found.demos):
      assert list(demo.messages) == messages
      assert demo.answer == answer
      assert demo.source == (f"{path}:{i + 1}" if name == "d.jsonl" else f"{path}[{i}]")
      assert list(demo.prompt) == messages[:-1] and demo.response == messages[-1]["content"]


def test_task_field_is_kept(tmp_path):
  path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b", "task": "add"}])
  assert read_demos(path).demos[0].task == "add"


def test_a_response_that_ran_out_of_tokens_has_not_ended(tmp_path):
  record = {"prompt": "Who?", "response": "Me, I th"}
  given = [{}, {"hit_eos": True}, {"hit_eos": False}, {"hit_eos": None}]
  path = write_jsonl(tmp_path / "d.jsonl", [{**record, **fields} for fields in given])
  assert [d.ended for d in read_demos(path).demos] == [True, True, False, True]
  for value, kind in (("false", "text"), (0, "a number"), ([], "a list")):
    path = write_jsonl(tmp_path / "bad.jsonl", [record, {**record, "hit_eos": value}])
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: field 'hit_eos' must be .* got {kind}$"):
      read_demos(path)


def test_json_lines_in_a_json_file_and_a_list_in_a_jsonl_file(tmp_path):
  record = {"prompt": "Who?", "response": "Me."}
  lines = write_jsonl(tmp_path / "lines.json", [record, record])
  listed = write_json(tmp_path / "list.jsonl", [record, record])
  assert [d.source for d in read_demos(lines).demos] == [f"{lines}:1", f"{lines}:2"]
  assert [d.source for d in read_demos(listed).demos] == [f"{listed}[0]", f"{listed}[1]"]


def test_byte_order_mark_blank_lines_crlf_and_unicode_separators(tmp_path):
  text = "one\u2028two\u2029three\x0bfour\x85five\x1c"
  lines = [json.dumps({"prompt": text, "response": "é\U0001f600"}, ensure_ascii=False)]
  lines += ["", "   ", json.dumps({"prompt": "q", "response": "r"})]
  # json.dumps escapes control characters below 0x20, the others stay raw as JSON permits.
  assert "\u2028" in lines[0] and "\x85" in lines[0]
  path = tmp_path / "d.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
  first, second = read_demos(path).demos
  assert first.prompt[0]["content"] == text and first.response == "é\U0001f600"
  assert second.source == f"{path}:4"


def test_limit_and_on_empty(tmp_path):
  records = [{"prompt": f"q{i}", "response": "" if i % 3 == 1 else f"r{i}"} for i in range(9)]
  path = write_jsonl(tmp_path / "d.jsonl", records)
  kept = [i for i in range(9) if i % 3 != 1]
  found = read_demos(path, on_empty="drop")
  assert [d.response for d in found.demos] == [f"r{i}" for i in kept] and found.dropped_empty == 3
  found = read_demos(path, on_empty="drop", limit=4)
  assert [d.response for d in found.demos] == [f"r{i}" for i in kept[:4]]
  assert found.dropped_empty == 2  # those before the fourth kept one
  assert read_demos(path, limit=1).demos[0].response == "r0"  # stops before the bad line
  with pytest.raises(UserError, match=r"d\.jsonl:2: empty response"):
    read_demos(path)
  with pytest.raises(UserError, match="limit=-1"):
    read_demos(path, limit=-1)
  with pytest.raises(UserError, match="on_empty='skip'.*error, drop"):
    read_demos(path, on_empty="skip")
  with pytest.raises(UserError, match="'csv' is unknown.*auto, messages.*gsm8k"):
    read_demos(path, format="csv")
  write_jsonl(path, [{"prompt": " \n", "response": "r"}, {"prompt": "q", "response": "\t"}])
  with pytest.raises(UserError, match=r":1: empty prompt"):
    read_demos(path)
  with pytest.raises(UserError, match="no demonstration left; all 2 records"):
    read_demos(path, on_empty="drop")


# (records, format, pattern after the place of record 1, the second)
BAD_RECORDS = [
  ({"prompt": "q"}, "prompt_response", "field 'response' is missing; found \\['prompt'\\]"),
  ({"prompt": "q", "response": None}, "prompt_response", "field 'response' is missing"),
  ({"prompt": 7, "response": "r"}, "prompt_response", "field 'prompt' must be text, got a number"),
  ({"prompt": ["q"], "response": "r"}, "prompt_response", r"prompt\[0\] must be an object, got"),
  ({"prompt": "q", "response": True}, "prompt_response", "'response' must be text, got a boolean"),
  ({"prompt": "q", "response": "r", "answer": 7}, "prompt_response", "'answer' must be text"),
  ({"prompt": "q", "response": "r", "task": 7}, "prompt_response", "'task' must be text"),
  ({"prompt": "q\ud83d", "response": "r"}, "prompt_response", "'prompt'.*surrogate"),
  ({"messages": [ASK, {"role": "assistant", "content": "\udc00"}]}, "messages",
   r"messages\[1\]: field 'content'.*surrogate"),
  ({"messages": []}, "messages", "'messages' must be a non-empty list"),
  ({"messages": "hi"}, "messages", "'messages' must be a non-empty list"),
  ({"text": "hi"}, "messages", "field 'messages' is missing; found \\['text'\\]"),
  ({"messages": [ASK, "Me."]}, "messages", r"messages\[1\] must be an object, got text"),
  ({"messages": [ASK, {"role": "narrator", "content": "x"}]}, "messages",
   r"messages\[1\]: unknown role 'narrator'; known: system, developer, user"),
  ({"messages": [ASK, {"role": "tool", "content": "x"}, REPLY]}, "messages", "roles out of order"),
  ({"messages": [ASK, {"role": "assistant"}]}, "messages",
   r"messages\[1\]: field 'content' is missing"),
  ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, REPLY]}, "messages",
   r"messages\[0\]: field 'content' has a part"),
  ({"messages": [ASK]}, "messages", "roles out of order \\(user\\).*ending with assistant"),
  ({"messages": [SYSTEM]}, "messages", "roles out of order \\(system\\)"),
  ({"messages": [REPLY]}, "messages", "roles out of order"),
  ({"messages": [ASK, SYSTEM, REPLY]}, "messages", "roles out of order"),
  ({"messages": [ASK, ASK, REPLY]}, "messages", "roles out of order"),
  ({"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "r"}]}, "sharegpt",
   r"conversations\[1\]: unknown role 'bot'"),
  ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "sharegpt",
   r"conversations\[1\]: field 'value' is missing"),
  ({"question": "q"}, "gsm8k", "field 'answer' is missing"),
  ({"instruction": "q"}, "alpaca", "field 'output' is missing"),
  ({"instruction": "q", "output": "r", "history": [["q"]]}, "alpaca", "field 'history' must be"),
  ({"instruction": "q", "output": "r", "history": "q"}, "alpaca", "field 'history' must be"),
  ({"instruction": "q", "output": "r", "history": [["q", "\ud800"]]}, "alpaca",
   "field 'history' holds a lone surrogate"),
]
GOOD = {
  "messages": {"messages": [ASK, REPLY]},
  "prompt_response": {"prompt": "q", "response": "r"},
  "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
  "gsm8k": {"question": "q", "answer": "r"},
  "alpaca": {"instruction": "q", "output": "r"},
}


@pytest.mark.parametrize("bad, format, pattern", BAD_RECORDS)
def test_bad_record_is_named_by_its_place(tmp_path, bad, format, pattern):
  lines = tmp_path / "d.jsonl"
  lines.write_text(json.dumps(GOOD[format]) + "\n\n" + json.dumps(bad) + "\n", encoding="utf-8")
  with pytest.raises(UserError, match=rf"d\.jsonl:3: .*{pattern}") as e:
    read_demos(lines)
  assert "\n" not in str(e.value)
  listed = write_json(tmp_path / "d.json", [GOOD[format], bad])
  with pytest.raises(UserError, match=rf"d\.json\[1\]: .*{pattern}"):
    read_demos(listed, format)


def test_bad_record_of_a_parquet_file(tmp_path):
  path = write_parquet(tmp_path / "d.parquet", [
    {"prompt": "q", "response": "r"}, {"prompt": "q", "response": None}])
  with pytest.raises(UserError, match=r"d\.parquet\[1\]: field 'response' is missing"):
    read_demos(path)


@pytest.mark.parametrize("name, content, pattern", [
  ("none.jsonl", None, "no such file; expected .jsonl, .json, .ndjson"),
  ("d.csv", b"a,b", "unknown suffix '.csv'; expected .jsonl"),
  ("d.jsonl", b"", "empty file"),
  ("d.jsonl", b"\n \n", "empty file"),
  ("d.json", b"[]", "empty file"),
  ("d.jsonl", b'{"prompt": "\xff"}', r"not UTF-8 text \(byte 12\)"),
  ("d.jsonl", b'{"prompt": "q", "response": "r"}\n{"prompt": \n',
   r"d\.jsonl:2: malformed JSON at column 12"),
  ("d.json", b'[{"prompt": "q", "response": "r"},\n {"prompt" "q"}]',
   r"d\.json:2: malformed JSON at column 12"),
  ("d.json", b'{\n "prompt": "q"\n}', r"d\.json:1: malformed.*expected one JSON object a line"),
  ("d.jsonl", b'"text"', r"d\.jsonl:1: expected a JSON object, got text"),
  ("d.jsonl", b"3", r"d\.jsonl:1: expected a JSON object, got a number"),
  ("d.json", b'[{"prompt": "q", "response": "r"}, null]', r"\[1\]: expected a JSON object, got n"),
  ("d.parquet", b"PAR1 and then nothing of the kind", "not a readable Parquet file"),
  ("d.parquet", b"", "not a readable Parquet file"),
  ("d.jsonl", b'{"text": "a"}', r":1: the fields \['text'\] fit no known format; known: messages"),
])
def test_bad_file(tmp_path, name, content, pattern):
  if name.endswith("parquet"):
    pytest.importorskip("pyarrow")
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=pattern) as e:
    read_demos(tmp_path / name)
  assert name in str(e.value)


def test_damaged_parquet_data_page(tmp_path):
  records = [{"prompt": "q" * 40 + str(i), "response": "r" * 40 + str(i)} for i in range(500)]
  path = write_parquet(tmp_path / "d.parquet", records)
  raw = bytearray(path.read_bytes())
  raw[4:400] = bytes(396)
  path.write_bytes(raw)
  with pytest.raises(UserError, match="not a readable Parquet file"):
    read_demos(path)


def test_later_record_of_another_format_is_refused(tmp_path):
  path = write_jsonl(tmp_path / "d.jsonl", [GOOD["alpaca"], GOOD["prompt_response"]])
  with pytest.raises(UserError, match=r":2: field 'instruction' is missing"):
    read_demos(path)


def test_read_prompts(tmp_path):
  records = [
    {"prompt": "Who?", "id": 7},
    {"prompt": "Who?", "response": "Me."},
    {"messages": [SYSTEM, ASK]},
    {"messages": [ASK, REPLY, MORE, END]},
  ]
  path = write_jsonl(tmp_path / "p.jsonl", records)
  prompts = read_prompts(path)
  assert [list(m) for m, _ in prompts] == [[ASK], [ASK], [SYSTEM, ASK], [ASK, REPLY, MORE]]
  assert [r for _, r in prompts] == records  # nothing is taken from the record
  assert read_prompts(path, limit=2) == prompts[:2]
  with pytest.raises(UserError, match="limit=-1"):
    read_prompts(path, limit=-1)
  for bad, pattern in [
    ({"text": "q"}, r":2: the fields \['text'\] fit no known format"),
    ({"prompt": " "}, ":2: empty prompt"),
    ({"prompt": 3}, ":2: field 'prompt' must be text"),
    ({"messages": [REPLY]}, ":2: roles out of order .*ending with user"),
    ({"messages": [SYSTEM, REPLY]}, ":2: roles out of order"),
  ]:
    write_jsonl(path, [records[0], bad])
    with pytest.raises(UserError, match=pattern):
      read_prompts(path)


def test_iter_records_is_lazy_after_the_first_records(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_text('{"a": 1}\nnot json\n')
  records = iter_records(path)
  assert next(records) == ({"a": 1}, f"{path}:1")
  with pytest.raises(UserError, match=":2: malformed JSON"):
    next(records)


# --- Real files ----------------------------------------------------------------------------------

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize("name, format, count, dropped", [
  ("alpaca/alpaca_data.json", "alpaca", 52_002, 28),
  ("gsm8k/train.jsonl", "gsm8k", 7473, 0),
  ("gsm8k/test.jsonl", "gsm8k", 1319, 0),
  ("lima/train_llamafactory.json", "alpaca", None, None),
  ("dolly/dolly_3k_alpagasus.json", "alpaca", None, None),
  ("dolly/dolly_sample_triforce.jsonl", "prompt_response", None, None),
  ("instruction_1k/instruction-data.json", "alpaca", None, None),
])
def test_real_files(name, format, count, dropped):
  path = DATA / name
  if not path.is_file():
    pytest.skip(f"{name} is not here")
  found = read_demos(path, on_empty="drop")
  assert found.format == format
  raw = sum(1 for _ in iter_records(path))
  assert len(found.demos) + found.dropped_empty == raw
  if count is not None:
    assert (raw, found.dropped_empty) == (count, dropped)
  holdout = raw // 10
  train, heldout = split_holdout(found.demos, holdout, seed=3)
  check_disjoint(train, heldout)
  assert 0.9 * holdout <= len(heldout) <= holdout
  if format == "gsm8k":
    for d in found.demos:
      assert "<<" not in d.response and d.response.endswith(f"#### {d.answer}")
      float(d.answer.replace(",", ""))


def test_real_alpaca_error_names_the_first_empty_output():
  path = DATA / "alpaca/alpaca_data.json"
  if not path.is_file():
    pytest.skip("alpaca is not here")
  records = json.loads(path.read_text(encoding="utf-8"))
  first = next(i for i, r in enumerate(records) if not r["output"].strip())
  with pytest.raises(UserError, match=rf"alpaca_data\.json\[{first}\]: empty response"):
    read_demos(path)


@pytest.mark.parametrize("record", [
  {"prompt": "q", "completion": "own"},
  {"question": "q", "answer": "own"},
  {"question": "q", "answer": "own #### 4\n#### 4"},
  {"instruction": "q", "input": "", "output": "own"},
  {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "own"}]},
  {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "own"}]},
  {"prompt": "q"},
], ids=lambda record: "-".join(record))
@pytest.mark.parametrize("response", ["sampled", ""])
def test_what_generate_wrote_of_any_format_is_read_as_it_was_sampled(tmp_path, record, response):
  path = tmp_path / "d.jsonl"
  line = {**record, "response": response, "token_ids": [1], "length": 1, "hit_eos": False}
  path.write_text(json.dumps(line) + "\n")
  (demo,) = read_demos(path, extra_fields=("*",)).demos
  assert [m["content"] for m in demo.messages] == ["q", response] and not demo.ended
  ((messages, carried),) = read_prompts(path)
  assert [m["content"] for m in messages] == ["q"] and carried == line


def test_a_config_knows_every_format():
  field = next(f for f in dataclasses.fields(DataSection) if f.name == "format")
  assert set(field.metadata["choices"]) == {"auto", *FORMATS}
