"""The measures of a reference against loops, and which candidate is chosen."""

import dataclasses
import json
import types

import numpy as np
import pytest

from dpr_jax.evaluation import reference_quality
from dpr_jax.evaluation.reference_quality import reward_statistics
from dpr_jax.references.base import ReferenceKind
from dpr_jax.references.midrun import Midrun
from dpr_jax.references.selected import Selected
from dpr_jax.workdir import Workdir


def test_statistics_of_token_rewards(rng):
  rewards = [rng.normal(0.1, 1.0, n).astype(np.float32) for n in rng.integers(1, 9, 12)]
  got = reward_statistics(rewards)
  flat = [float(x) for r in rewards for x in r]
  totals = [sum(map(float, r)) for r in rewards]
  assert got["kl"] == pytest.approx(np.mean(totals), abs=1e-6)
  assert got["kl_se"] == pytest.approx(np.std(totals, ddof=1) / np.sqrt(12), abs=1e-6)
  assert got["snr"] == pytest.approx(np.mean(flat) / np.std(flat), abs=1e-6)
  assert reward_statistics([np.zeros(3, np.float32)])["snr"] == 0.0


def test_the_largest_is_chosen_and_the_earliest_of_equals():
  table = [{"auc": 0.6, "snr": 0.1}, {"auc": 0.7, "snr": float("nan")}, {"auc": 0.7, "snr": 0.2}]
  assert Selected().choose(table) == 1 and Selected(criterion="snr").choose(table) == 2
  with pytest.raises(ValueError, match="^criterion=snr: no candidate has a finite snr"):
    Selected(criterion="snr").choose(table[1:2])
  assert Midrun().choose(table) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Last(ReferenceKind):
  """A user's own way to select."""

  def choose(self, candidates):
    return len(candidates) - 1


@pytest.mark.parametrize("kind,chosen", [(Last(), {"chosen": 1}), (Midrun(), {})])
def test_a_kind_of_a_user_selects_as_well(kind, chosen, tmp_path, monkeypatch):
  figures = {"text": "ref", "kl": 1.0, "kl_se": 0.1, "snr": 0.2, "auc": 0.7}
  monkeypatch.setattr(reference_quality, "_measure", lambda run: [figures, figures])
  run = types.SimpleNamespace(
      config=types.SimpleNamespace(
          reference=kind, eval=types.SimpleNamespace(reference_prompts=4)
      ),
      workdir=Workdir(tmp_path),
  )
  reference_quality.measure_reference(run)
  record = json.loads((tmp_path / "reference.json").read_text())
  assert record == {"candidates": [figures, figures], **chosen}
