"""The pages name what is there: paths, modules, links, fields and flags."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest
from absl import flags

from dpr_jax import main as entry_point
from dpr_jax.config.run_config import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Flags without a config file: what the page writes about them alone.
_OTHERS = ("score", "generate", "export", "evaluate", "filter", "compare")

_spec = importlib.util.spec_from_file_location(
    "make_configuration", ROOT / "docs" / "make_configuration.py"
)
make_configuration = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_configuration)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def code(page: pathlib.Path) -> list[str]:
  """Fenced blocks, indented blocks and code spans, with broken lines joined."""
  text = page.read_text()
  fenced = re.findall(r"^```\w*[^\n]*\n(.*?)^```", text, re.M | re.S)
  text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
  indented = re.findall(r"(?:^    .*\n)+", text, re.M)
  spans = [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", text)]
  return [re.sub(r"\s*\\\n\s*", " ", x) for x in (*fenced, *indented)] + spans


@pages
def test_paths_exist(page):
  # Not what a run leaves beside them, as the commands of the pages say: runs/.
  tops = (p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "runs")
  top = "|".join(name for name in tops if not name.startswith("."))
  rooms = "|".join(p.name for p in (ROOT / "dpr_jax").iterdir() if p.is_dir())
  for text in code(page):
    # A path of the repository, or of the package where the page leaves dpr_jax/ out.
    for path in re.findall(rf"(?<![\w/.@=]|\{{)((?:{top})/[\w./]*\w)", text):
      assert (ROOT / path).exists(), path
    for path in re.findall(rf"(?<![\w/.@=]|\{{)((?:{rooms})/[a-z0-9_]+\.(?:py|j2))\b", text):
      assert (ROOT / "dpr_jax" / path).exists() or (ROOT / path).exists(), path


@pages
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#\s]*)(?:#[\w-]*)?\)", page.read_text()):
    assert "://" in target or not target or (page.parent / target).exists(), target


@pages
def test_modules_exist(page):
  for name in re.findall(r"python -m ((?:dpr_jax|benchmarks)[\w.]*)", "\n".join(code(page))):
    if name == "dpr_jax.evaluate":
      pytest.importorskip(name)
    assert importlib.util.find_spec(name), name


def commands(page: pathlib.Path) -> list[list[str]]:
  """Words of each line of code that sets fields of a config."""
  lines = [line for text in code(page) for line in text.splitlines() if "--config" in line]
  return [shlex.split(line.partition("#")[0].replace("&& python", "; python")) for line in lines]


@pages
def test_config_flags_are_fields(page, monkeypatch):
  if page.name == "extending.md":
    return  # `test_extending` runs it, with the fields that it adds.
  monkeypatch.chdir(ROOT)
  for words in commands(page):
    given = [re.sub(r"\$\S*$", "", w) for w in words if re.match(r"--config(\.[\w.]+)?=", w)]
    given = [w.removesuffix(":corrupt=") for w in given if not re.search(r"FIELD|=KIND", w)]
    fields = [w for w in given if w.startswith("--config.")]
    file = [w for w in given if w.startswith("--config=configs/") and "NAME" not in w]
    methods = {m[1] for w in fields if (m := re.match(r"--config\.methods\.(\w+)", w))}
    if methods and not any(w.startswith("--config.compare") for w in words):
      fields.append(f"--config.compare={','.join(sorted(methods))}")  # A flag beside others.
    if fields or file:
      entry_point.parse([*(file or ["--config=configs/smoke.py"]), *fields, "--workdir=x"])


@pages
def test_flags_of_other_entry_points_exist(page):
  for line in "\n".join(code(page)).splitlines():
    match = re.search(rf"python -m dpr_jax\.({'|'.join(_OTHERS)})\b(.*)", line)
    if not match:
      continue
    values = flags.FlagValues()
    pytest.importorskip(f"dpr_jax.{match[1]}").define(values)
    for name in re.findall(r"--(\w+)", match[2].partition("#")[0]):
      assert name in values or (match[1], name) == ("filter", "config"), f"{match[1]} --{name}"


def test_the_configuration_page_is_up_to_date():
  path = ROOT / "docs" / "configuration.md"
  made = make_configuration.page()
  assert path.read_text() == made, "python docs/make_configuration.py"


def test_every_field_has_a_meaning():
  rows = re.findall(r"^\| `(\w+)`.*?\|.*?\| (.*?) \|", make_configuration.page(), re.M)
  assert len(rows) > 100
  assert not [name for name, meaning in rows if not meaning.strip()]


def test_every_field_of_a_run_is_on_the_page():
  text = make_configuration.page()
  for field in dataclasses.fields(RunConfig):
    assert f"`{field.name}`" in text or f"config.{field.name}" in text, field.name


def test_a_comment_where_a_field_is_declared_is_its_meaning():
  @dataclasses.dataclass
  class Sized:
    """A size."""

    width: int = 3  # columns, all of them.
    # Not of a field.
    height: int = 4

  found = {f.name: make_configuration.meaning(Sized, f) for f in dataclasses.fields(Sized)}
  assert found == {"width": "columns, all of them", "height": ""}


@pages
def test_the_tests_that_a_page_names_exist(page):
  named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
  assert len(named) > {"faults.md": 40, "cleaning_theory.md": 15}.get(page.name, -1)
  for file, test in named:
    assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
