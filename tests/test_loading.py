"""How a CKPT argument is read."""

import pytest

from dpr_jax.loading import split_checkpoint


@pytest.mark.parametrize("spec,path,fraction", [
    ("run/sft", "run/sft", ""), ("run/sft@0.5", "run/sft", "0.5"),
    ("run/sft@ema", "run/sft", "ema"),
    ("me@lab/run/sft", "me@lab/run/sft", ""), ("me@lab/run/sft@0.5", "me@lab/run/sft", "0.5"),
    ("models/org@2", "models/org@2", ""),  # There is such a folder.
])
def test_an_at_sign_of_the_path_is_no_fraction(tmp_path, monkeypatch, spec, path, fraction):
  (tmp_path / "models" / "org@2").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert split_checkpoint(spec) == (tmp_path / path, fraction)
