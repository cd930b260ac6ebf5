"""Every file of configs/: valid, of the true size, and small under `:debug`."""

import dataclasses
import pathlib

import pytest

from dpr_jax.data import encode_response, make_demos, render_prompt
from dpr_jax.errors import UserError
from dpr_jax.main import parse
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
# Those that can be given to --config; model_shapes.py is what several of them import.
CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()
)

# Parameters of the published weights, the text part alone, a tied head counted once.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "gemma3_270m": 268_098_176,
    "gemma3_4b": 3_880_263_168,
    "llama32_1b": 1_235_814_400,
    "llama31_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen25_7b": 7_615_616_512,
}


@pytest.fixture(autouse=True)
def root(monkeypatch):
  monkeypatch.chdir(ROOT)


def read(name, *flags):
  return parse([f"--config=configs/{name}", "--workdir=unused", *flags])[0]


def test_every_config_is_covered():
  assert set(CONFIGS) == {"smoke", "research", "known_expert", *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_is_that_of_the_published_weights(name):
  assert read(f"{name}.py").model.shape.num_params == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_debug_keeps_the_family_and_is_small(name):
  full, debug = read(f"{name}.py").model.shape, read(f"{name}.py:debug").model.shape
  for field in ("activation", "norm_unit_offset", "sandwich_norm", "qk_norm", "qkv_bias",
                "tied_head", "layer_pattern"):
    assert getattr(full, field) == getattr(debug, field), field
  assert full.rope.scaling == debug.rope.scaling
  assert (full.local_rope is None) == (debug.local_rope is None)
  assert (full.num_heads == full.num_kv_heads) == (debug.num_heads == debug.num_kv_heads)
  assert dataclasses.replace(debug, vocab_size=261).num_params < 100_000


@pytest.mark.parametrize("name", CONFIGS)
def test_another_argument_is_refused(name):
  with pytest.raises(UserError, match=rf"^configs/{name}.py takes .*debug.* not 'big'$"):
    read(f"{name}.py:big")


def test_the_settings_of_the_study():
  run = read("research.py:corrupt=0.2,sft=middle")
  assert run.data.corrupt == 0.2 and run.eval.num_prompts >= 512 and run.reference.fraction == 0.1
  steps = [read(f"research.py:sft={s}").sft.steps for s in ("early", "middle", "late")]
  assert steps == sorted(set(steps)) and read("research.py").sft.steps == steps[-1]
  assert read("research.py:corrupt=0.3,debug").data.corrupt == 0.3
  with pytest.raises(UserError, match="sft=soon is not one of early, middle, late"):
    read("research.py:sft=soon")


def test_long_answers_fit_the_settings_of_the_study():
  run = read("research.py:tasks=long,kind=step,corrupt=0.1,minority=0.1,sft=middle")
  debug = read("research.py:tasks=long,debug")
  assert debug.data.tasks == run.data.tasks and debug.sft.steps < 100
  assert debug.data.prompt_length == run.data.prompt_length
  assert (run.data.corruption, run.data.minority) == ("step", 0.1)
  assert "minority_style" in run.eval.metrics and "minority_style" not in read(
    "research.py").eval.metrics
  tokenizer = byte_tokenizer()
  for demo in make_demos(run.data.tasks, 2000, 0, minority=1.0):
    prompt = render_prompt(demo.prompt, tokenizer)
    response = encode_response(demo.messages[-1], demo.prompt, tokenizer)
    assert len(prompt) <= run.data.prompt_length
    assert len(response) <= run.eval.max_new_tokens == run.budget.max_new_tokens
    assert len(prompt) + len(response) <= run.data.row_length
  with pytest.raises(UserError, match="tasks=some is not one of short, long"):
    read("research.py:tasks=some")
  with pytest.raises(UserError, match="corruption='lie' is not one of answer, token"):
    read("research.py:kind=lie")


def test_the_student_of_the_known_expert():
  run, debug = read("known_expert.py"), read("known_expert.py:debug")
  assert run.eval.expert == run.model.pretrained and run.model.keep_layers == 6
  assert run.model.shape.num_params == PUBLISHED["smollm2_135m"]
  assert run.data.prompt_length + run.budget.max_new_tokens <= run.data.row_length
  assert (debug.eval.expert, debug.model.keep_layers, debug.data.demos) == ("", 0, "")
  assert read("known_expert.py:debug", "--config.eval.expert=runs/a/sft").eval.expert


def test_shapes_export_as_their_family():
  from dpr_jax.weights.hf_config import from_hf, to_hf

  families = {"smollm2_135m": "llama", "gemma3_270m": "gemma3_text", "gemma3_4b": "gemma3_text",
              "llama32_1b": "llama", "llama31_8b": "llama", "mistral_7b": "mistral",
              "qwen25_7b": "qwen2"}
  for name, family in families.items():
    shape = read(f"{name}.py").model.shape
    fields = to_hf(shape)
    assert fields["model_type"] == family
    assert from_hf(fields).num_params == PUBLISHED[name]
