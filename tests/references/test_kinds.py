"""Each kind of reference: the checkpoints it is made of, and what a config refuses of it."""

import json
import types

import pytest

from dpr_jax.config import default_config, resolve
from dpr_jax.config.fields import kinds
from dpr_jax.errors import UserError
from dpr_jax.references import Reference
from dpr_jax.references.checkpoint import Checkpoint
from dpr_jax.references.ema import EMA
from dpr_jax.references.ensemble import Ensemble
from dpr_jax.references.half_data import HalfData
from dpr_jax.references.midrun import Midrun
from dpr_jax.references.pretrained import Pretrained
from dpr_jax.references.selected import Selected

KINDS = kinds("dpr_jax.references")
EXAMPLES = [
    Midrun(fraction=0.25), HalfData(fraction=0.3), EMA(decay=0.9), Pretrained(),
    Ensemble(fractions=(0.1, 0.75), combine="mean_logp"), Selected(criterion="snr"),
    Checkpoint(path="runs/other/sft"),
]


def _resolve(reference, **fields):
  config = default_config()
  config.reference = reference
  for name, value in fields.items():
    section, _, field = name.partition("__")
    config[section][field] = value
  return resolve(config)


def _run(reference, tmp_path):
  """What of a run the kinds call, with names of checkpoints for their variables."""
  return types.SimpleNamespace(
      config=_resolve(reference),
      checkpoint=lambda stage, step, dtype, part="variables": {"is": (stage, step, dtype, part)},
      initial_variables=lambda dtype: {"is": ("initial", dtype)},
      workdir=types.SimpleNamespace(reference_file=tmp_path / "reference.json"),
  )


def test_every_kind_is_looked_at():
  assert sorted(type(x).kind for x in EXAMPLES) == sorted(KINDS)


def test_members_of_each_kind(tmp_path):
  def members(reference):
    run = _run(reference, tmp_path)
    assert run.config.reference == reference  # As it was assigned, through the config.
    made = run.config.reference(run, "bfloat16")
    assert isinstance(made, Reference) and len(made.members) == reference.num_members
    return [m["is"] for m in made.members]

  sft = lambda step, part="variables": ("sft", step, "bfloat16", part)
  steps = default_config().sft.steps
  assert members(Midrun()) == [sft(steps // 2)]
  assert members(Midrun(fraction=0.25)) == [sft(steps // 4)]
  assert members(HalfData(fraction=0.3)) == [("ref", round(0.3 * steps), "bfloat16", "variables")]
  assert members(EMA()) == [sft(steps, "ema")]
  assert members(Pretrained()) == [("initial", "bfloat16")]
  several = [sft(round(0.1 * steps)), sft(round(0.75 * steps))]
  for combine in ("logmeanexp", "mean_logp"):
    reference = Ensemble(fractions=(0.1, 0.75), combine=combine)
    assert members(reference) == several
    assert reference(_run(reference, tmp_path), "float32").combine == combine
  for chosen, fraction in enumerate((0.1, 0.25, 0.5, 0.75)):
    (tmp_path / "reference.json").write_text(json.dumps({"chosen": chosen}))
    assert members(Selected()) == [sft(round(fraction * steps))]


def test_only_the_moving_average_makes_sft_keep_one():
  assert {type(x).kind: x.ema_decay for x in EXAMPLES if x.ema_decay} == {"ema": 0.9}


def test_candidates_are_the_reference_itself_or_the_milestones_before_the_end(tmp_path):
  for reference in EXAMPLES:
    found = reference.candidates(_run(reference, tmp_path))
    if isinstance(reference, Selected):
      assert found == [Midrun(fraction=f) for f in (0.1, 0.25, 0.5, 0.75)]
    else:
      assert found == [reference]


def test_descriptions_tell_them_apart():
  others = [Midrun(), HalfData(), EMA(), Ensemble(), Selected(), Checkpoint(path="x.gguf")]
  texts = [x.describe() for x in (*EXAMPLES, *others)]
  assert len(set(texts)) == len(texts) and all(text.startswith("ref ") for text in texts)


@pytest.mark.parametrize("reference, fields, message", [
    (Midrun(fraction=0.4), {}, r"fraction=0.4 is not among the kept milestones \[0.1, .*add it"),
    (Midrun(fraction=1.0), {}, r"fraction=1.0 of \d+ steps is the last of them: ref would be sft"),
    (Midrun(fraction=0.99), {"sft__steps": 20, "sft__milestones": (0.5, 0.99)},
     r"fraction=0.99 of 20 steps is the last"),
    (Midrun(fraction=0.75), {"sft__steps": 1, "sft__milestones": (0.75,)}, r".* is the last"),
    (Ensemble(fractions=(0.49, 0.51)), {"sft__steps": 20, "sft__milestones": (0.49, 0.51)},
     r"fractions=\(0.49, 0.51\) are the steps \[10, 10\] of 20"),
    (Ensemble(fractions=(0.99, 1.0)), {"sft__steps": 20, "sft__milestones": (0.99,)},
     r"fractions=.* are the steps \[20, 20\] of 20"),
    (HalfData(fraction=0.99), {"sft__steps": 20}, r"fraction=0.99 must .* but not all of them"),
    (Selected(), {"sft__steps": 20, "sft__milestones": (0.49, 0.51)},
     r"needs at least two sft.milestones, at different steps"),
    (HalfData(fraction=0.0), {}, r"fraction=0.0 must lie between 0 and 1"),
    (HalfData(fraction=1.0), {}, r"fraction=1.0 must lie between 0 and 1"),
    (HalfData(fraction=1e-6), {"sft__steps": 100}, r"fraction=1e-06 .* one of the 100 SFT steps"),
    (Ensemble(fractions=(0.25, 0.4)), {}, r"fractions\[1\]=0.4 is not among .*milestones"),
    (Selected(), {"sft__milestones": (0.5, 1.0)}, r"needs at least two sft.milestones"),
    (Selected(), {"eval__reference_prompts": 0}, r".*eval.reference_prompts.* at least 1"),
    (Checkpoint(), {}, r"path is missing"),
])
def test_what_a_run_cannot_have_is_refused(reference, fields, message):
  with pytest.raises(UserError, match=rf"^config\.reference: {message}"):
    _resolve(reference, **fields)


@pytest.mark.parametrize("reference", [Midrun(), Pretrained()], ids=lambda r: r.kind)
def test_milestones_that_sft_cannot_have_are_its_own_error(reference):
  with pytest.raises(UserError, match=r"^config\.sft: milestones: 0.1 of 4 steps is step 0"):
    _resolve(reference, sft__steps=4)


@pytest.mark.parametrize("reference, field, value, message", [
    (EMA(), "decay", 1.0, r"\.decay=1.0 is out of range"),
    (EMA(), "decay", 0.0, r"\.decay=0.0 is out of range"),
    (EMA(), "decay", 1e-9, r"\.decay=1e-09 is out of range"),
    (Ensemble(), "combine", "median", r"\.combine='median' is not one of logmeanexp, mean_logp"),
    (Ensemble(), "fractions", (0.5, 0.5), r": fractions=\(0.5, 0.5\): .*at least two"),
    (Selected(), "criterion", "loss", r"\.criterion='loss' is not one of validation, snr"),
    (Midrun(), "kind", "last", r"\.kind='last' is not one of .*midrun"),
])
def test_a_field_out_of_its_bounds_is_refused(reference, field, value, message):
  config = default_config()
  config.reference = reference
  config.reference[field] = value
  with pytest.raises(UserError, match=rf"^config\.reference{message}"):
    resolve(config)
