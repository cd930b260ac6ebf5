"""The recipes of docs/extending.md, extracted from the page and run."""

import ast
import json
import pathlib
import re
import sys
import textwrap

import pytest

from dpr_jax import main as entry_point
from dpr_jax.config import resolve
from dpr_jax.config.files import load_config
from dpr_jax.errors import UserError

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
CONFIG_LINES = "config lines"  # the title of blocks that stand in the config file.
SIZES = """
sft.steps=8 sft.batch_size=4 budget.steps=2 budget.batch_size=4 budget.max_new_tokens=8
data.num_demos=40 data.holdout=8 eval.num_prompts=8 eval.batch_size=8 eval.max_new_tokens=8
eval.frontier_samples=0 eval.corrupted_tokens=0 eval.reference_prompts=0 eval.heatmaps=0
model.shape.num_layers=1 model.remat=none log.tensorboard=False log.progress=False
compare=('focal','confident') methods.focal.gamma=3
"""


def blocks() -> list[tuple[str, str]]:
  """(title, code) of the page's Python blocks."""
  return re.findall(r'^```python title="(.+?)"\n(.*?)^```$', PAGE.read_text(), re.M | re.S)


FILES = {title: code for title, code in blocks() if title != CONFIG_LINES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The files of the page; the config with the lines of all recipes at its comment."""
  path = tmp_path_factory.mktemp("mine")
  lines = "".join(code for title, code in blocks() if title == CONFIG_LINES)
  comment = re.search(r"^  # The config lines .*\n", FILES["mine.py"], re.M)[0]
  config = FILES["mine.py"].replace(comment, textwrap.indent(lines, "  "))
  for name, code in {**FILES, "mine.py": config}.items():
    (path / name).write_text(code)
  yield path
  if str(path) in sys.path:
    sys.path.remove(str(path))


@pytest.fixture(scope="module")
def workdir(folder):
  """One run with everything that the page adds to a run."""
  import jax

  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  flags = [f"--config.{size}" for size in SIZES.split()]
  entry_point.main([f"--config={folder}/mine.py:debug", f"--workdir={folder}/run", *flags])
  jax.config.update("jax_disable_most_optimizations", before)
  return folder / "run"


@pytest.fixture(scope="module")
def results(workdir):
  return json.loads((workdir / "report" / "results.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_one_short_file(name):
  tree = ast.parse(FILES[name])
  assert len(FILES[name].splitlines()) <= 30
  assert name == "mine.py" or len([n for n in tree.body if isinstance(n, ast.ClassDef)]) == 1


def test_every_value_is_in_the_record_of_the_run(workdir):
  config = json.loads((workdir / "config.json").read_text())["config"]
  focal = config["methods"]["focal"]
  assert (focal["kind"], focal["gamma"]) == ("focal:Focal", 3.0)  # gamma is a flag of the run.
  assert config["methods"]["confident"]["reward"]["kind"] == "confident:Confident"
  assert config["reference"] == {"kind": "averaged:Averaged", "fractions": [0.25, 0.75]}
  assert config["eval"]["metrics"]["distinct"] == {"kind": "distinct:Distinct"}


def test_the_method_and_the_reward_are_trained_evaluated_and_compared(results):
  for name in ("focal", "confident"):
    assert results["stages"][name]["steps"] == 2
    assert "accuracy_sampled" in results["systems"][name]
    assert [name, "sft"] in [c["pair"] for c in results["comparisons"]]
  assert results["main"] == "confident"
  assert results["labels"]["confident"] == "DPR, confident"
  assert "learning_rate 0.0003" in results["stages"]["focal"]["own_budget"]


def test_the_metric_is_a_column_of_every_system(results):
  columns = ("distinct_sampled", "distinct_greedy")
  assert all(c in values for values in results["systems"].values() for c in columns)
  assert results["columns"]["distinct_sampled"]["label"] == "Distinct words, sampled"
  assert set(columns) <= {c["metric"] for c in results["comparisons"]}


def test_the_report_shows_them_all(workdir):
  page = (workdir / "report" / "report.html").read_text()
  for text in ("Focal SFT", "DPR, confident", "Distinct words", "mean weights of SFT at 25%, 75%"):
    assert text in page, text


@pytest.mark.parametrize("flag, said", [
    ("methods.focal.gamma=-1", "config.methods.focal.gamma=-1.0 is out of range"),
    ("reference.fractions=(0.3,)", "config.reference: fraction=0.3 is not among the kept"),
])
def test_what_is_wrong_is_named_before_the_run_starts(folder, flag, said):
  with pytest.raises(UserError, match=re.escape(said)):
    entry_point.parse([
        f"--config={folder}/mine.py", f"--workdir={folder}/x", f"--config.{flag}",
    ])


def test_the_reward_is_zero_where_sft_is_unsure(folder):
  import jax.numpy as jnp
  from confident import Confident

  logp, entropy = jnp.array([[-1.0, -2.0]]), jnp.array([[0.5, 3.0]])
  assert Confident()(logp, logp - 1, entropy).tolist() == [[1.0, 0.0]]


def test_the_method_can_be_planned(folder):
  import jax

  from dpr_jax.methods.programs import Shapes
  from dpr_jax.models import Transformer
  from dpr_jax.sharding import make_mesh

  config = load_config(f"{folder}/mine.py:debug")
  config.model.shape.vocab_size = 272
  config = resolve(config)
  mesh = make_mesh()
  shapes = Shapes(config, Transformer(config.model.shape), mesh)
  assert shapes.key.shape == ()  # Made before a mesh is set.
  with jax.set_mesh(mesh):
    (program,) = config.methods["focal"].programs(shapes, "focal")
    assert program.name == "focal/train_step"
    assert program.lower().as_text()


def test_the_benchmark_runs_by_its_file(folder, workdir):
  evaluate = pytest.importorskip("dpr_jax.evaluate")
  (folder / "quiz.tsv").write_text("Is ice cold?\tyes\nIs fire cold?\tno\n")
  evaluate.main([
      f"--model={workdir}/confident", f"--benchmark={folder}/quiz.py:Quiz",
      f"--data={folder}/quiz.tsv", f"--output={folder}/quiz", "--batch_size=2",
  ])
  results = json.loads((folder / "quiz" / "results.json").read_text())
  assert results["n"] == 2
  assert set(results["metrics"]) >= {"accuracy", "decided"}
  assert len((folder / "quiz" / "responses.jsonl").read_text().splitlines()) == 2
