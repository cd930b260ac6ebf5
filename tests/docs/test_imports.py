"""Imports point downwards, from level to level of the table in docs/architecture.md."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILES = sorted((ROOT / "dpr_jax").rglob("*.py"))

# (importer, imported): why, and what would end it.
KNOWN = {
    # The section config.model holds the shape of a model.
    ("dpr_jax.config.sections", "dpr_jax.models.config"),
    ("dpr_jax.config.sections", "dpr_jax.models.lora"),
    ("dpr_jax.config.run_config", "dpr_jax.models.config"),
}
_FILES_AND_PROCESSES = {"io", "json", "os", "pathlib", "pickle", "shutil", "subprocess", "tempfile"}


def levels() -> dict[str, int]:
  """Room -> level, as in {"methods": 5, "run": 6}."""
  rows = re.findall(r"^\| (\d) \| (.*?) \|", PAGE, re.M)
  return {
      room: int(level) for level, text in rows
      for room in re.findall(r"`dpr_jax/(\w+)(?:\.py)?`", text)
  }


def module_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path: pathlib.Path) -> set[str]:
  """The modules that a file imports, also inside of functions; its `__main__` block apart."""
  tree, found = ast.parse(path.read_text()), set()
  tree.body = [n for n in tree.body if "__main__" not in ast.unparse(getattr(n, "test", n))[:40]]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name in MODULES else node.module for name in names}
  return found


def room(module: str) -> str:
  """'methods' of dpr_jax.methods.dpr; "" of the package itself."""
  return f"{module}.".split(".")[1]


def level_of(module: str) -> int:
  """A module that no row names is an entry point."""
  return levels().get(room(module), max(levels().values()))


def test_every_room_is_in_the_table():
  packages = {path.parent.name for path in FILES if path.name == "__init__.py"
              and path.parent.parent.name == "dpr_jax"}
  assert packages <= set(levels())
  entry_points = {p for p in (ROOT / "dpr_jax").glob("*.py") if p.stem not in levels()}
  for path in entry_points - {ROOT / "dpr_jax" / "__init__.py"}:
    assert "__main__" in path.read_text(), f"{path.name} is in no row and is no entry point"


def test_imports_point_downwards():
  upwards = {
      (module_of(path), name)
      for path in FILES for name in imported(path)
      if name.startswith("dpr_jax.") and level_of(name) > level_of(module_of(path))
  }
  assert upwards == KNOWN


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle():
  edges = {
      (room(module_of(path)), room(name))
      for path in FILES for name in imported(path) if name.startswith("dpr_jax.")
      if level_of(name) == level_of(module_of(path)) < 7 and room(name) != room(module_of(path))
  }
  assert not {(a, b) for a, b in edges if (b, a) in edges}


def test_losses_rewards_and_models_read_and_write_no_files():
  for path in FILES:
    if room(module_of(path)) not in ("losses", "rewards", "models"):
      continue
    roots = {name.partition(".")[0] for name in imported(path)}
    assert not roots & _FILES_AND_PROCESSES, path
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"open", "print"} & {f.id for f in calls if isinstance(f, ast.Name)}, path


def test_models_know_nothing_of_training():
  for path in (ROOT / "dpr_jax" / "models").glob("*.py"):
    ours = {room(name) for name in imported(path) if name.startswith("dpr_jax.")}
    assert ours <= {"models", "sharding", "errors", "keys"}, path
