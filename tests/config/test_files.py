"""Arguments of config files: what stands after the colon."""

import pytest

from dpr_jax.config.files import other_config, parse_arg
from dpr_jax.errors import UserError


def read(arg):
  return parse_arg("configs/x.py", arg, corrupt=0.0, sft="late", layers=2, debug=False).to_dict()


def test_defaults_and_types():
  assert read("") == {"corrupt": 0.0, "sft": "late", "layers": 2, "debug": False}
  assert read("corrupt=1,debug") == {"corrupt": 1.0, "sft": "late", "layers": 2, "debug": True}
  assert read("sft=early,layers=3,debug=False")["layers"] == 3
  assert isinstance(read("corrupt=1")["corrupt"], float)


@pytest.mark.parametrize("arg,named", [
    ("corupt=0.1", "not 'corupt=0.1'"), ("sft", "not 'sft'"), ("big", "not 'big'"),
    ("layers=2.5", "'layers=2.5' must be of type int"),
    ("corrupt=much", "'corrupt=much' must be of type float"),
    ("debug=maybe", "'debug=maybe' must be True or False"),
])
def test_a_wrong_argument_is_named(arg, named):
  with pytest.raises(UserError) as caught:
    read(arg)
  assert str(caught.value).startswith("configs/x.py") and named in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_config_made_from_another(tmp_path):
  (tmp_path / "base.py").write_text(
      "from dpr_jax.config import default_config\n\n"
      "def get_config(arg=''):\n"
      "  config = default_config()\n  config.data.demos = arg\n  return config\n"
  )
  here = str(tmp_path / "sweeps" / "one.py")
  assert other_config(here, "../base.py", "debug").data.demos == "debug"
  assert other_config(here, "../base.py").data.demos == ""
