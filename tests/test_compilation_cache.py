"""Where compiled programs are kept."""

import jax
import pytest

from dpr_jax import config, main, pipeline
from dpr_jax.compilation_cache import keep_compilations
from dpr_jax.errors import UserError


@pytest.fixture
def told(monkeypatch):
  """What jax is told, instead of telling it."""
  values = {}
  monkeypatch.setattr(jax.config, "update", values.__setitem__)
  return values


@pytest.mark.parametrize("path,environment,default,expected", [
    ("given", None, "workdir", "given"), ("given", "env", "workdir", "given"),
    ("", "env", "workdir", None), ("", None, "workdir", "workdir"), (None, None, None, None),
])
def test_the_flag_then_the_environment_then_the_workdir(
    path, environment, default, expected, told, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  before = jax.config.jax_compilation_cache_dir
  real_update = type(jax.config).update
  real_update(jax.config, "jax_compilation_cache_dir", environment)
  try:
    keep_compilations(path, default)
  finally:
    real_update(jax.config, "jax_compilation_cache_dir", before)
  assert told.get("jax_compilation_cache_dir") == expected


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--compilation_cache=.*/file is a file; name a folder"):
    keep_compilations(str(tmp_path / "file" / "below"))


def test_main_takes_the_flag(tmp_path):
  argv = ["--config=configs/smoke.py", "--workdir=unused", f"--compilation_cache={tmp_path}"]
  _, how = main.parse(argv)
  assert how["compilation_cache"] == str(tmp_path)


def test_a_run_keeps_them_in_its_workdir_unless_told_otherwise(monkeypatch, tmp_path):
  class Kept(Exception):
    pass

  def keep(path, default):
    raise Kept(path, default)

  monkeypatch.setattr(pipeline, "keep_compilations", keep)
  for path in (None, "elsewhere"):
    with pytest.raises(Kept) as kept:
      pipeline.run(config.resolve(config.default_config()), str(tmp_path / "run"), path)
    assert kept.value.args == (path, tmp_path / "run" / "compilation_cache")
