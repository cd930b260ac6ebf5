"""Fields that say more than the text of a conversation: each is read, or refused by its name."""

import json
import pathlib

import numpy as np
import pytest

from dpr_jax.data.demos import as_record
from dpr_jax.data.formats import read_demos, read_prompts
from dpr_jax.data.templates import encode_demo, encode_response, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

ASK, SURE = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "sure?"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]
# Writes tools, calls, thoughts, and any role.
TOOL_TEMPLATE = (
  "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
  "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
  "{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}{{ m.content }}"
  "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + c.function.arguments + ']' }}"
  "{% endfor %}{{ '<|end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def write(path: pathlib.Path, *records) -> pathlib.Path:
  path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
  return path


def reply(text: str, **fields):
  return {"role": "assistant", "content": text, **fields}


def trained_text(demo, **options) -> str:
  tokenizer = byte_tokenizer()
  example = encode_demo(demo, tokenizer, **options)
  return tokenizer.decode(example.tokens[example.loss_mask == 1])


def only(path):
  (demo,) = read_demos(path).demos
  return demo


@pytest.mark.parametrize("field, no, yes", [
  ("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("loss_mask", 0, 1),
  ("trainable", False, True), ("training", False, True), ("loss", False, True),
])
def test_a_turn_that_is_not_to_be_trained_gives_no_loss(tmp_path, field, no, yes):
  turns = [ASK, reply("5", **{field: no}), SURE, reply("4", **{field: yes})]
  demo = only(write(tmp_path / "d.jsonl", {"messages": turns}))
  assert trained_text(demo) == "4<|end|>" and demo.trains_last
  assert len(encode_demo(demo, byte_tokenizer()).tokens) == len(  # The text is there.
    encode_demo(only(write(tmp_path / "e.jsonl", {"messages": [
      ASK, reply("5"), SURE, reply("4")]})), byte_tokenizer()).tokens)
  system = {"system": "Be brief.", "messages": [ASK, reply("5", **{field: no}), SURE, reply("4")]}
  assert trained_text(only(write(tmp_path / "d.jsonl", system))) == "4<|end|>"
  demo = only(write(tmp_path / "d.jsonl", {"prompt": "q", "response": "r", field: no}))
  assert trained_text(demo) == "" and not demo.trains_last
  assert trained_text(only(write(tmp_path / "d.jsonl", {"prompt": "q", "response": "r",
                                                        field: yes}))) == "r<|end|>"


def test_weights_between_and_trained_users_are_refused(tmp_path):
  for value in (0.5, 2, "0", [0, 1]):
    path = write(tmp_path / "d.jsonl", {"messages": [ASK, reply("4", weight=value)]})
    with pytest.raises(UserError, match=r"d\.jsonl:1: messages\[1\]: field 'weight' must be 0 or"):
      read_demos(path)
  path = write(tmp_path / "d.jsonl", {"messages": [{**ASK, "train": True}, reply("4")]})
  with pytest.raises(UserError, match=r"messages\[0\]: only turns of the assistant are trained"):
    read_demos(path)


def test_unknown_fields_are_refused_unless_they_are_carried(tmp_path):
  path = write(tmp_path / "d.jsonl", {"prompt": "q", "response": "r", "id": 3, "source": "x"},
               {"prompt": "q", "response": "r", "style": "loud"})
  with pytest.raises(UserError, match=r"d\.jsonl:2: field 'style' is not known.*extra_fields"):
    read_demos(path)
  for extra in (("style",), ("*",)):
    assert len(read_demos(path, extra_fields=extra).demos) == 2
  assert len(read_prompts(path)) == 2  # The whole record is in the output.
  write(path, {"messages": [{**ASK, "mood": "glad"}, reply("4")]})
  with pytest.raises(UserError, match=r"messages\[0\]: field 'mood' is not known"):
    read_demos(path)
  # What says nothing is no field: null, as Arrow has it in every row, and empty values.
  write(path, {"messages": [{**ASK, "mood": None, "weight": None, "tool_calls": None},
                            reply("4", tool_calls=[], weight=None)], "tools": None, "style": "",
               "images": []})
  assert only(path).messages == (ASK, reply("4"))


@pytest.mark.parametrize("record", [
  {"prompt": "2+2?", "response": "4"},
  {"messages": [ASK, reply("4")]},
  {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
  {"instruction": "2+2?", "output": "4"},
  {"question": "2+2?", "answer": "4"},
])
def test_a_system_field_is_the_system_message_of_every_format(tmp_path, record):
  want = ({"role": "system", "content": "Be brief."}, ASK, reply("4"))
  for field in ("system", "system_prompt"):
    path = write(tmp_path / "d.jsonl", {**record, field: "Be brief."})
    assert only(path).messages == want
    assert read_prompts(path)[0][0] == want[:2]
  with pytest.raises(UserError, match="'system' and 'system_prompt' differ"):
    read_demos(write(tmp_path / "d.jsonl", {**record, "system": "a", "system_prompt": "b"}))


def test_a_system_field_beside_a_system_message(tmp_path):
  turns = [{"role": "system", "content": "Be brief."}, ASK, reply("4")]
  path = write(tmp_path / "d.jsonl", {"system": "Be brief.", "messages": turns})
  assert only(path).messages == tuple(turns)
  write(path, {"system": "Be long.", "messages": turns})
  with pytest.raises(UserError, match="d.jsonl:1: field 'system' differs"):
    read_demos(path)


def test_a_response_beside_an_answer(tmp_path):
  """As generate adds it to the records it was given."""
  path = write(tmp_path / "d.jsonl", {"messages": [ASK], "response": "4"},)
  assert only(path).messages == (ASK, reply("4"))
  for record in ({"messages": [ASK, reply("gold")]}, {"instruction": "2+2?", "output": "gold"},
                 {"prompt": "2+2?", "completion": "gold"}):
    with pytest.raises(UserError, match="field 'response' differs from the answer"):
      read_demos(write(path, {**record, "response": "4"}))
    assert only(write(path, {**record, "response": "gold"})).response == "gold"
  demo = only(write(path, {"question": "2+2?", "answer": "so\n#### 4", "response": "I say 5"}))
  assert (demo.response, demo.answer) == ("I say 5", "4")
  # A response that ended at once is one; an empty demonstration is not.
  assert only(write(path, {"prompt": "q", "response": "", "hit_eos": True})).response == ""


def test_tools_calls_and_thoughts_are_what_the_template_writes(tmp_path):
  template = tmp_path / "t.jinja"
  template.write_text(TOOL_TEMPLATE)
  turns = [ASK, reply("", tool_calls=CALL), {"role": "tool", "content": "noon"},
           reply("At noon.", reasoning_content="so it is")]
  path = write(tmp_path / "d.jsonl", {"messages": turns, "tools": TOOLS})
  demo, tokenizer = only(path), byte_tokenizer()
  example = encode_demo(demo, tokenizer, template=str(template))
  assert tokenizer.decode(example.tokens) == (
    f"<|system|>{json.dumps(TOOLS)}<|end|><|user|>2+2?<|end|><|assistant|>[clock{{}}]<|end|>"
    "<|tool|>noon<|end|><|assistant|>(so it is)At noon.<|end|>")
  assert trained_text(demo, template=str(template)) == "[clock{}]<|end|>(so it is)At noon.<|end|>"
  # Prompts of the same record, for rollouts, scores and generation, have the tools too.
  prompt = render_prompt(demo.prompt, tokenizer, str(template))
  response = encode_response(demo.messages[-1], demo.prompt, tokenizer, str(template))
  np.testing.assert_array_equal(np.concatenate([prompt, response]), example.tokens)
  assert read_prompts(path)[0][0] == demo.prompt
  assert only(write(tmp_path / "again.jsonl", as_record(demo.messages))).messages == demo.messages
  # In JSON, as ShareGPT and Arrow files have them, they are the same.
  shared = [{"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(CALL[0]["function"])},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "At noon.", "reasoning_content": "so it is"}]
  other = only(write(path, {"conversations": shared, "tools": json.dumps(TOOLS)}))
  np.testing.assert_array_equal(
    encode_demo(other, tokenizer, template=str(template)).tokens, example.tokens)


@pytest.mark.parametrize("record, what", [
  ({"messages": [ASK, reply("4")], "tools": TOOLS}, "field 'tools'"),
  ({"messages": [ASK, reply("4", tool_calls=CALL)]}, "field 'tool_calls'"),
  ({"messages": [ASK, reply("4", reasoning_content="hm")]}, "field 'reasoning_content'"),
  ({"messages": [ASK, reply("4"), {"role": "tool", "content": "x"}, reply("5")]}, "role 'tool'"),
  ({"messages": [{"role": "system", "content": "x"}, ASK, reply("4")]}, "role 'system'"),
])
def test_what_a_template_passes_over_is_refused(tmp_path, record, what):
  """The same records are fine under the template above, which writes them all."""
  template = tmp_path / "t.jinja"
  template.write_text(
    "{% for m in messages if m.role in ('user', 'assistant') %}{{ '<|' + m.role + '|>' + m.content "
    "+ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
  demo = only(write(tmp_path / "d.jsonl", record))
  with pytest.raises(UserError, match=rf"d\.jsonl:1: the chat template writes nothing of .*{what}"):
    encode_demo(demo, byte_tokenizer(), template=str(template))
  template.write_text(TOOL_TEMPLATE)
  assert encode_demo(demo, byte_tokenizer(), template=str(template)).loss_mask.any()


@pytest.mark.parametrize("record, pattern", [
  ({"messages": [ASK, reply("4")], "tools": "clock"}, "field 'tools' is text that is not JSON"),
  ({"messages": [ASK, reply("4")], "tools": ["clock"]}, "field 'tools' must be a list of objects"),
  ({"messages": [ASK, reply("4", tool_calls=["x"])]}, "'tool_calls' must be a list of objects"),
  ({"messages": [ASK, reply("4", reasoning_content=4)]}, "'reasoning_content' must be text"),
  ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "x"}]},
   "'function_call' is text that is not JSON"),
  ({"messages": [ASK, reply("4")], "tools": json.loads('[{"a":' * 90 + "1" + "}]" * 90)},
   "nested deeper than 100 levels"),
  ({"prompt": "q", "messages": [ASK, reply("4")]}, "'prompt' is not the first user turn"),
])
def test_fields_of_another_type(tmp_path, record, pattern):
  with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{pattern}"):
    read_demos(write(tmp_path / "d.jsonl", record))


def test_trl_completions_alone_are_trained(tmp_path):
  history = [ASK, reply("5"), SURE]
  path = write(tmp_path / "d.jsonl", {"prompt": history, "completion": [reply("4")]})
  assert only(path).messages == (*history, reply("4"))
  assert trained_text(only(path)) == "4<|end|>"
  assert read_prompts(path)[0][0] == tuple(history)
  write(path, {"prompt": [ASK], "completion": [reply("5", weight=0), SURE, reply("4")]})
  assert trained_text(only(path)) == "4<|end|>"


def test_dialogues_out_of_order_can_be_dropped(tmp_path):
  turn = lambda who, text: {"from": who, "value": text}
  good = {"conversations": [turn("human", "a"), turn("gpt", "b")]}
  path = write(
    tmp_path / "d.jsonl", {"conversations": [turn("gpt", "x"), *good["conversations"]]}, good,
    {"conversations": [*good["conversations"], turn("human", "c")]})
  with pytest.raises(UserError, match="d.jsonl:1: roles out of order"):
    read_demos(path)
  found = read_demos(path, on_disorder="drop")
  assert [d.response for d in found.demos] == ["b"] and found.dropped_disordered == 2
  with pytest.raises(UserError, match="on_disorder='skip' is unknown; known: error, drop"):
    read_demos(path, on_disorder="skip")


def test_calculator_annotations_and_references_are_those_of_gsm8k(tmp_path):
  answers = {
    "cat <<EOF\none\nEOF\nls >> log": None,
    "a <<interface>> and <<a=b>>": None,
    "x = hi << 8 | lo; y = x >> 8": None,
    "In short\n#### Details\nIt stores.": None,
    "A heading\n#### 12 steps\nOne.": None,
    "6*7 = <<6*7=42>>42, <<1,000*.5=$500.>>500\n#### 1,042": "1,042",
  }
  path = write(tmp_path / "d.jsonl", *({"question": f"q{i}", "answer": a}
                                       for i, a in enumerate(answers)))
  found = read_demos(path)
  assert found.format == "question_answer"
  *plain, last = found.demos
  assert [d.response for d in plain] == [d.answer for d in plain] == list(answers)[:-1]
  assert (last.response, last.answer) == ("6*7 = 42, 500\n#### 1,042", "1,042")


@pytest.mark.parametrize("text", ["[oops", "[" * 100_000, '["\\ud800"]', "3"], ids=range(4))
@pytest.mark.parametrize("place", ["tool_calls", "tools", "function_call"])
def test_json_that_stands_as_text_is_checked_like_any_other(tmp_path, place, text):
  record = {"messages": [ASK, reply("4")]}
  if place == "tools":
    record["tools"] = text
  elif place == "tool_calls":
    record["messages"][1] = {**reply("4"), "tool_calls": text}
  else:
    record = {"conversations": [{"from": "human", "value": "q"},
                                {"from": "function_call", "value": text}]}
  path = tmp_path / "d.jsonl"
  path.write_text(json.dumps(record) + "\n")
  with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{place}") as caught:
    read_demos(path)
  assert "\n" not in str(caught.value)
