"""Files, flags and models that no honest user makes: one line, no traceback, no hang, no write."""

import json
import pathlib
import struct

import numpy as np
import pytest

from dpr_jax import evaluate, generate, main, score
from dpr_jax.config import default_config, resolve
from dpr_jax.data import limits
from dpr_jax.data.templates import render_prompt, stop_ids
from dpr_jax.errors import UserError
from dpr_jax.weights import load_config, load_generation_config
from dpr_jax.weights.byte_tokenizer import byte_tokenizer
from dpr_jax.weights.gguf_file import GGUFFile
from dpr_jax.weights.safetensors_file import SafetensorsFile, write_safetensors

CONFIG = {
    "model_type": "llama", "vocab_size": 261, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}


def refuses(call, *args):
  """Whether a call ends in a UserError of one line that can be read."""
  with pytest.raises(UserError) as error:
    call(*args)
  assert 0 < len(str(error.value)) < 2100 and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A random model of one layer, as a Hugging Face folder."""
  folder, noise = tmp_path_factory.mktemp("hostile") / "model", np.random.default_rng(0)
  folder.mkdir()
  layer = "model.layers.0."
  shapes = {"model.embed_tokens.weight": (261, 16), "model.norm.weight": (16,)}
  shapes |= {f"{layer}{n}.weight": (16,) for n in ("input_layernorm", "post_attention_layernorm")}
  shapes |= {f"{layer}self_attn.{n}_proj.weight": (16, 16) for n in "qkvo"}
  shapes |= {f"{layer}mlp.{n}_proj.weight": (32, 16) for n in ("gate", "up")}
  shapes[f"{layer}mlp.down_proj.weight"] = (16, 32)
  entries = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
  draw = lambda name: noise.normal(size=shapes[name]).astype(np.float32)
  write_safetensors(folder / "model.safetensors", entries, draw)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  byte_tokenizer().save_pretrained(folder)
  return folder


@pytest.fixture
def untouched(model, tmp_path):
  """The test leaves no file in its folder, or in that of the model, that it did not make."""
  yield
  assert {p.name for p in tmp_path.rglob("*")} <= {"in.jsonl", "in.json", "in.parquet", "taken"}
  assert {p.name for p in model.parent.iterdir()} == {"model"}


def ask(entry_point, model, tmp_path, source, *flags):
  models = [f"--model={model}"] if entry_point is generate else [f"--sft={model}", f"--ref={model}"]
  entry_point.main([*models, f"--input={source}", f"--output={tmp_path}/out.jsonl",
                    "--batch_size=1", *flags])


def record(**fields):
  return json.dumps({"prompt": "a", "response": "b", **fields})


HALF = "\ud800"
DEEP = 100_000
RECORDS = {
    "lists nested deep": f'{{"prompt": "a", "response": "b", "x": {"[" * DEEP}{"]" * DEEP}}}',
    "objects nested deep": '{"x": ' * DEEP + "1" + "}" * DEEP,
    "open lists nested deep": "[" * DEEP,
    "nested as deep as Python reads": record(x=json.loads("[" * 400 + "]" * 400)),
    "an integer of 10,000 digits": f'{{"prompt": "a", "response": "b", "x": {"9" * 10_000}}}',
    "a negative one": f'{{"prompt": "a", "response": "b", "x": -{"9" * 10_000}}}',
    "half a character in the prompt": record(prompt=HALF),
    "half a character in another field": record(x=HALF),
    "half a character in a name": record(**{HALF: 1}),
    "half a character deep inside": record(x=[{"y": ["z", HALF + "z"]}]),
    "half a character in a turn": json.dumps({"messages": [
        {"role": "user", "content": HALF}, {"role": "assistant", "content": "b"}]}),
    "a long prompt": record(prompt="a" * 10_000_000),
    "a long prompt of spaces and letters": record(prompt="a b" * 3_000_000),
    "a long turn": json.dumps({"messages": [
        {"role": "user", "content": "a" * 9_000_000}, {"role": "assistant", "content": "b"}]}),
    "bytes": b"\xff\xfe\x00",
    "zeros": b"\0" * 100,
    "nothing": "",
    "blanks": " \n\t\n",
    "a number": "7",
    "null": "null",
    "text": '"a"',
    "cut short": '{"prompt": "a", "resp',
    "no value": '{"prompt": , "response": "b"}',
    "a list in a line": "[]",
    "prompt null": record(prompt=None),
    "prompt a number": record(prompt=7),
    "prompt an object": record(prompt={"a": 1}),
    "prompt a switch": record(prompt=True),
    "no prompt": json.dumps({"response": "b"}),
    "messages an object": json.dumps({"messages": {}}),
    "messages empty": json.dumps({"messages": []}),
    "messages of numbers": json.dumps({"messages": [1, 2]}),
    "messages of another role": json.dumps({"messages": [{"role": "root" * 5000, "content": "a"}]}),
    "content a number": json.dumps({"messages": [{"role": "user", "content": 7}]}),
    "content of pictures": json.dumps({"messages": [
        {"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}]}),
    "roles in disorder": json.dumps({"messages": [{"role": "assistant", "content": "a"}] * 3}),
}


@pytest.mark.parametrize("entry_point", [score, generate], ids=["score", "generate"])
@pytest.mark.parametrize("name", RECORDS)
def test_records(entry_point, name, model, tmp_path, untouched):
  text = RECORDS[name]
  path = tmp_path / "in.jsonl"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  refuses(ask, entry_point, model, tmp_path, path)


@pytest.mark.parametrize("name", ["lists nested deep", "an integer of 10,000 digits",
                                  "half a character in another field", "bytes", "nothing"])
def test_demonstrations_of_a_run(name, tmp_path, untouched):
  text, path = RECORDS[name], tmp_path / "in.json"
  path.write_bytes(text if isinstance(text, bytes) else f"[{text}]".encode())
  refuses(main.main, ["--config=configs/smoke.py:debug", f"--workdir={tmp_path}/run",
                      f"--config.data.demos={path}", "--config.log.progress=False"])


def _strict(name):
  raise ValueError(f"{name} is not in JSON")


@pytest.mark.parametrize("value", ["date", "bytes", "text in bytes", "nan", "infinity", "decimal"])
def test_columns_of_parquet_are_written_as_json(value, model, tmp_path):
  """Whatever stands beside prompt and response: dates as text, NaN as null."""
  pytest.importorskip("pyarrow")
  import datetime
  import decimal

  import pyarrow as pa
  import pyarrow.parquet as pq

  given, wanted = {
      "date": (datetime.datetime(2024, 5, 1), "2024-05-01T00:00:00"), "bytes": (b"\0\xff", "AP8="),
      "text in bytes": (b"abc", "abc"), "nan": (float("nan"), None),
      "infinity": (float("inf"), None), "decimal": (decimal.Decimal("1.50"), "1.50"),
  }[value]
  table = pa.Table.from_pylist([{"prompt": "hi", "response": "yo", "x": {"y": [given]}}])
  pq.write_table(table, tmp_path / "in.parquet")
  ask(score, model, tmp_path, tmp_path / "in.parquet")
  (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
  assert json.loads(line, parse_constant=_strict)["x"] == {"y": [wanted]}


@pytest.mark.parametrize("content", [b"PAR1" + b"\xff" * 200 + b"PAR1", b"PAR1", b"\0" * 64])
def test_damaged_parquet(content, model, tmp_path, untouched):
  pytest.importorskip("pyarrow")
  (tmp_path / "in.parquet").write_bytes(content)
  refuses(ask, score, model, tmp_path, tmp_path / "in.parquet")


LONG = "x" * 300
FLAGS = [
    *(f"--batch_size={n}" for n in (0, -1, 10**12, 10**40, "x", "1e3")),
    *(f"--seed={n}" for n in (2**63, 2**64, -(2**63) - 1, 10**40, "9" * 10_000)),
    *(f"--samples={n}" for n in (0, 10**12)),
    *(f"--max_new_tokens={n}" for n in (0, -5, 64, 10**12)),
    *(f"--top_k={n}" for n in (-1, 10**12)),
    *(f"--top_p={x}" for x in ("nan", 2, -1, 0)),
    *(f"--temperature={x}" for x in ("nan", "inf", -1)),
    *(f"--mesh={x}" for x in ("1,1", "a,b,c", "0,1,1", "7,7,7", "-1,-1,1", f"{10**30},1,1")),
    "--stop=", "--dtype=float16", "--unknown=1", "stray", "--template=/nowhere.jinja",
    f"--template=/{LONG}", "--template=a\0b",
    *(f"--model={x}" for x in ("/nowhere", f"/{LONG}", "a\0b", "@", "[x]", "a@b@0.5", "/", "")),
    *(f"--input={x}" for x in ("/nowhere.jsonl", f"/{LONG}.jsonl", "a\0b", "/", "", "setup.py")),
    *(f"--output={x}" for x in ("/nowhere/a", f"{LONG}", "a\0b", "/", "setup.py", "/dev/full",
                                "/proc/x", "a" * 252)),
]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda f: f[:30].replace("\0", "0"))
def test_flags(flag, model, tmp_path, untouched):
  (tmp_path / "in.jsonl").write_text(record())
  refuses(ask, generate, model, tmp_path, tmp_path / "in.jsonl", "--max_new_tokens=2", flag)


def test_outputs_are_checked_before_anything_is_computed(model, tmp_path, untouched):
  (tmp_path / "in.jsonl").write_text("not read")
  (tmp_path / "taken").mkdir()
  for html in ("out.jsonl", "taken/../out.jsonl", "taken", f"taken/{LONG}", "nowhere/page.html"):
    refuses(ask, score, model, tmp_path, tmp_path / "in.jsonl", f"--html={tmp_path}/{html}")
  output = f"--output={tmp_path}/{LONG}"
  refuses(evaluate.main, [f"--model={model}", "--benchmark=tasks", output])


def test_an_at_sign_may_stand_in_a_path(model, tmp_path):
  place = tmp_path / "me@lab" / "[run]"
  place.mkdir(parents=True)
  (place / "model@1").symlink_to(model)
  (place / "in.jsonl").write_text(record())
  ask(score, place / "model@1", place, place / "in.jsonl")
  assert json.loads((place / "out.jsonl").read_text())["reward"] == 0


# --- Models --------------------------------------------------------------------------------------

SIZES = [name for name, value in CONFIG.items() if type(value) is int]


@pytest.mark.parametrize("value", [10**12, 10**400, -1, 0, 1.5, "12", [1], True, {}],
                         ids=lambda v: repr(v)[:15])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_a_config(name, value, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value}))
  refuses(load_config, tmp_path)


@pytest.mark.parametrize("text", [
    "[" * DEEP, '{"a":' * DEEP, f'{{"vocab_size": {"9" * 10_000}}}', "", "[]", "7", "\ud800", "{",
], ids=lambda t: f"{t[:6]!r}")
def test_texts_of_a_config(text, tmp_path):
  (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
  refuses(load_config, tmp_path)


@pytest.mark.parametrize("value", ["2", 1.5, [[2]], {"a": 1}, -1, 2**40, True, ["2"], [None]],
                         ids=repr)
def test_ends_of_a_generation_config(value, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": value}))
  refuses(lambda: stop_ids(byte_tokenizer(), load_generation_config(tmp_path)))


def header(**tensors):
  return json.dumps(tensors)


def tensor(shape, offsets, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "huge": header(a=tensor([1], [0, 10**30])),
    "infinite": header(a=tensor([1], [0, 4])).replace("4]", "Infinity]"),
    "not a number": header(a=tensor([1], [0, 4])).replace("4]", "NaN]"),
    "overlapping": header(a=tensor([2], [0, 8]), b=tensor([2], [4, 12])),
    "the same": header(a=tensor([2], [0, 8]), b=tensor([2], [0, 8])),
    "backwards": header(a=tensor([1], [4, 0])),
    "negative": header(a=tensor([1], [-4, 0])),
    "text": header(a=tensor([1], ["0", "4"])),
    "fractions": header(a=tensor([1.5], [0, 6])),
    "a huge shape": header(a=tensor([10**9, 10**9], [0, 4])),
    "a shape of text": header(a=tensor("1", [0, 4])),
    "10,000 digits": header(a=tensor([1], [0, 4])).replace("4]", "4" * 10_000 + "]"),
    "three offsets": header(a=tensor([1], [0, 4, 8])),
    "no offsets": header(a={"dtype": "F32", "shape": [1]}),
    "a list": "[]",
    "nested": "[" * DEEP,
    "a dtype that is a list": header(a=tensor([1], [0, 4], ["F32"])),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(name, tmp_path):
  text = HEADERS[name].encode()
  path = tmp_path / "a.safetensors"
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
  refuses(SafetensorsFile, path)


def test_lengths_of_safetensors(tmp_path):
  path = tmp_path / "a.safetensors"
  for length in (2**64 - 1, 2**40, 100):
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    refuses(SafetensorsFile, path)


def _string(text):
  return struct.pack("<Q", len(text)) + text.encode()


def _gguf(metadata, tensors=b"", count=0):
  head = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata))
  for key, value in metadata.items():
    if isinstance(value, str):
      kind, data = 8, _string(value)
    elif isinstance(value, int):
      kind, data = 4, struct.pack("<I", value)
    else:
      kind, data = 6, struct.pack("<f", value)
    head += _string(key) + struct.pack("<I", kind) + data
  return head + tensors


LLAMA = {"general.architecture": "llama", "llama.embedding_length": 16, "llama.block_count": 1,
         "llama.attention.head_count": 2, "llama.feed_forward_length": 32,
         "llama.context_length": 64, "llama.attention.layer_norm_rms_epsilon": 1e-5}
TABLE = _string("token_embd.weight") + struct.pack("<IQQIQ", 2, 1, 1, 0, 0)


@pytest.mark.parametrize("change", [
    *({key: "many"} for key in LLAMA), {"split.count": "3"}, {"general.alignment": "x"},
    {"general.alignment": 0}, {"llama.attention.key_length": "x"},
    {"llama.attention.head_count_kv": "x"}, {"llama.rope.freq_base": "x"},
    {"llama.rope.dimension_count": "x"}, {"llama.block_count": 2**31},
    {"llama.embedding_length": 2**32 - 1}, {"llama.rope.scaling.type": 7},
], ids=str)
def test_counts_of_a_gguf(change, tmp_path):
  pytest.importorskip("gguf")
  path = tmp_path / "a.gguf"
  path.write_bytes(_gguf({**LLAMA, **change}, TABLE, 1) + bytes(256))
  refuses(load_config, path)


@pytest.mark.parametrize("content", [
    b"", b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), b"x" * 100,
    b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60),
    b"GGUF" + struct.pack("<IQQ", 9, 0, 0), _gguf({}, _string("a") + struct.pack("<I", 9), 1),
    _gguf({}, _string("a") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0), 1),
    _gguf({}, _string("a") + struct.pack("<IQIQ", 1, 32, 999, 0), 1),
], ids=range(10))
def test_damaged_gguf(content, tmp_path):
  pytest.importorskip("gguf")
  (tmp_path / "a.gguf").write_bytes(content)
  refuses(GGUFFile, tmp_path / "a.gguf")


# --- Chat templates and configs ------------------------------------------------------------------

TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long text in steps": "{{ 'a' * 1_000_000_000 }}",
    "doubles": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
               "{% endfor %}",
    "writes without an end": "{% for i in range(99999) %}{% for j in range(99999) %}"
                             "{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
    "a product": "{% set n = 1000000 %}{{ ('a' * (n * 3000)) | length }}",
    "a square": "{% set x = 'a'.center(100000) %}{{ x.replace('', x) | length }}",
    "a long range": "{% for i in range(1000000) %}x{% endfor %}",
    "long": "x" * 2_000_000,
    "not UTF-8": b"\xff\xfe",
    "no Jinja": "{% for %}",
    "unclosed": "{% if x %}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls nothing": "{{ nothing() }}",
    "a wrong type": "{{ messages + 1 }}",
    "raises": "{{ raise_exception('no') }}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "changes its input": "{{ messages.clear() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, tmp_path, monkeypatch):
  monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.5)
  monkeypatch.setattr(limits, "TEMPLATE_BYTES", 1 << 27)
  path, text = tmp_path / "a.jinja", TEMPLATES[name]
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  refuses(render_prompt, [{"role": "user", "content": "hi"}], byte_tokenizer(), str(path), "a:1")


COUNTS = (
    "seeds", "sft.steps", "sft.batch_size", "sft.accumulation", "budget.steps", "budget.batch_size",
    "budget.max_new_tokens", "eval.batch_size", "eval.frontier_samples", "data.num_demos",
    "data.holdout", "data.row_length", "checkpoint.every", "model.shape.hidden_size",
    "model.shape.vocab_size", "model.shape.num_layers",
)


@pytest.mark.parametrize("value", [10**12, 10**400, -(10**12)], ids=["12", "400", "-12"])
@pytest.mark.parametrize("field", [*COUNTS, "seed"])
def test_numbers_of_a_run(field, value):
  if field == "seed" and value == 10**12:
    value = 2**63
  config = default_config()
  *sections, name = field.split(".")
  section = config
  for part in sections:
    section = section[part]
  section[name] = value
  refuses(resolve, config)


def test_there_are_enough_of_them(request):
  here = pathlib.Path(__file__)
  assert sum(item.path == here for item in request.session.items) >= 150
