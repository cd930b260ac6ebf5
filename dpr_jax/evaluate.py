r"""Evaluates a model on a benchmark: its responses with their scores, means and intervals.

    python -m dpr_jax.evaluate --model=CKPT --benchmark=NAME --data=FILE --output=DIR

NAME is a kind of dpr_jax/evaluation/benchmarks (tasks, gsm8k, exact, ifeval, perplexity, ...) or a
class of your own: module:Class or path/to/file.py:Class. Its fields are flags too, as in
--benchmark.shots=5 --benchmark.shots_file=train.jsonl. `tasks` makes its prompts itself and takes
no --data. lm_eval:TASK,... runs tasks of lm-evaluation-harness; --data is then a folder of task
YAMLs, or left out for the tasks of the harness, whose data must be local.

preference generates nothing either: it scores both responses of each pair of --data, with
--benchmark.ref=CKPT for pi_ref.

--metrics=file.py:Class,... measures something else of each response.

Prompts that are among the demonstrations that a stage of a workdir was trained on are counted in
results.json; with --strict_overlap they are an error.

DIR/responses.jsonl has one line per prompt and sample, DIR/results.json the means over prompts with
95% intervals; with --samples=N also pass@k. Rerun the same command to resume an interrupted
evaluation; the files are the same as those of an uninterrupted one.

A judge scores what no program can (alpaca_eval, arena_hard, lima, mt_bench): a model behind an
OpenAI-compatible endpoint (--judge_url with --judge_model, the key in OPENAI_API_KEY), a local
reward model (--judge_model=FOLDER), or a class of your own (--judge=file.py:Class). Its fields are
flags too, as in --judge.concurrency=32. DIR/judgments.jsonl has its replies; no question is asked
twice. DIR/judged.jsonl has what they amount to for each response.

--stop=STRING, which may be repeated, ends a response before STRING, for example
--stop=$'\n\nQuestion:'.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dpr_jax import cli, distributed
from dpr_jax.cli import judges as judges_cli
from dpr_jax.cli import models as models_cli
from dpr_jax.cli.flags import flag_value
from dpr_jax.cli.values import define_fields, make_value, value_class
from dpr_jax.errors import UserError, naming
from dpr_jax.keys import MAX_SEED

BENCHMARKS, METRICS = "dpr_jax.evaluation.benchmarks", "dpr_jax.evaluation.metrics"
# What a benchmark that only scores demonstrated responses has no use for.
_GENERATION = ("samples", "temperature", "top_k", "top_p", "max_new_tokens", "stop", "seed")


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("model", None, "CKPT.", flag_values=values)
  flags.DEFINE_string("benchmark", None, "A kind, module:Class or file.py:Class.",
                      flag_values=values)
  flags.DEFINE_string("data", "", "JSONL, JSON, Parquet or Arrow.", flag_values=values)
  flags.DEFINE_string("output", None, "Folder to write, or to resume.", flag_values=values)
  flags.DEFINE_integer("samples", 1, "Responses per prompt.", lower_bound=1, flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "0 is greedy.", flag_values=values)
  flags.DEFINE_integer("top_k", 0, "0 keeps all tokens.", flag_values=values)
  flags.DEFINE_float("top_p", 1.0, "1 keeps all tokens.", flag_values=values)
  flags.DEFINE_integer("max_new_tokens", None, "Per response; default: the benchmark's.",
                       lower_bound=1, flag_values=values)
  flags.DEFINE_multi_string("stop", [], "Ends a response before this text; may be repeated.",
                            flag_values=values)
  flags.DEFINE_integer("max_prompts", 0, "The first so many of the data; 0 takes all.",
                       lower_bound=0, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, upper_bound=MAX_SEED,
                       flag_values=values)
  flags.DEFINE_bool("strict_overlap", False, "Refuse prompts that the model was trained on.",
                    flag_values=values)
  flags.DEFINE_list("metrics", ["length", "eos_rate"], "Of each response: kinds, module:Class or "
                    "file.py:Class, separated by commas.", flag_values=values)
  judges_cli.define_judge_flags(values)
  flags.DEFINE_string("judge_prompts", "", "JSON lines of name, system_prompt and prompt_template "
                      "in place of the package's own prompts.", flag_values=values)
  models_cli.define_model_flags(values, "Responses decoded, or scored,")


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, Any, dict[str, Any], Any]:
  """Command line -> (flags, benchmark, metrics by name, judge or None).

  Raises:
    UserError: naming the flag, and what would be right.
  """
  from dpr_jax.config.fields import kinds
  from dpr_jax.evaluation.benchmarks.base import Benchmark
  from dpr_jax.evaluation.metrics import ResponseMetric

  judge_cls = judges_cli.judge_class(argv)
  name = flag_value(argv, "benchmark") or ""
  kind, _, argument = name.partition(":")
  if argument and (field := getattr(kinds(BENCHMARKS).get(kind), "argument", "")):
    name, argv = kind, [*argv, f"--benchmark.{field}={argument}"]
  cls = value_class("benchmark", BENCHMARKS, name, Benchmark) if name else None

  def define_all(values):
    define(values)
    if cls:
      define_fields(values, "benchmark", cls)
    if judge_cls:
      define_fields(values, "judge", judge_cls)

  values = cli.parse_flags(
      argv, entry_point="dpr_jax.evaluate", doc=__doc__, define=define_all,
      required={"model": "runs/smoke/dpr", "benchmark": "gsm8k", "output": "runs/gsm8k"},
  )
  benchmark, metrics = make_value(values, "benchmark", cls), {}
  _check(values, benchmark)
  for spec in () if benchmark.own_requests else values.metrics:
    metric = value_class("metrics", METRICS, spec, ResponseMetric)
    # Named as the package's own are: EosRate is eos_rate.
    key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", metric.__name__).lower()
    if key in metrics or key in benchmark.scores:
      raise UserError(f"--metrics={spec}: there is another score called {key}")
    metrics[key] = make_value(values, "metrics", metric)
  return values, benchmark, metrics, judges_cli.judge_of(values, judge_cls, benchmark)


def _check(values: flags.FlagValues, benchmark: Any) -> None:
  """Raises UserError for flags that contradict each other or the benchmark."""
  from dpr_jax.rollout.stop_strings import check_stop_strings
  from dpr_jax.workdir import versions

  try:
    versions(*benchmark.packages)
  except importlib.metadata.PackageNotFoundError as e:
    raise UserError(f"--benchmark={values.benchmark} needs {e.name}, which is not installed: "
                    "pip install 'dpr_jax[eval]'") from None
  if benchmark.needs_data is not None and bool(values.data) != benchmark.needs_data:
    raise UserError(
        "--data is missing; for example --data=test.jsonl" if benchmark.needs_data else
        f"--data={values.data}: {values.benchmark} makes its own prompts; leave it out"
    )
  reason, unused = "scores given responses and generates nothing", _GENERATION
  if benchmark.own_requests:
    reason, unused = "says itself what is asked and measured", (*_GENERATION, "metrics")
  for name in unused if benchmark.likelihood or benchmark.own_requests else ():
    if values[name].present:
      raise UserError(f"--{name}: {values.benchmark} {reason}")
  if values.samples > 1 and values.temperature == 0:
    raise UserError(f"--samples={values.samples}: greedy responses are all the same; set "
                    "--temperature, for example to 1")
  with naming("--stop"):
    check_stop_strings(values.stop)


def _sources(*of: Any) -> dict[str, str]:
  """Class -> fingerprint of its file, of those that users wrote."""
  from dpr_jax.config.fields import kind_of
  from dpr_jax.fingerprints import of_file

  users = [value for value in of if not type(value).__module__.startswith("dpr_jax.")]
  return {kind_of(value): of_file(inspect.getsourcefile(type(value))) for value in users}


@cli.readable
def main(argv: Sequence[str]) -> None:
  distributed.initialize()
  values, benchmark, metrics, judge = parse(argv)
  from dpr_jax.evaluation.benchmark_run import EvaluationFolder, digest, fill
  from dpr_jax.evaluation.judging import judge_responses
  from dpr_jax.evaluation.overlap import find_overlap

  folder = EvaluationFolder(values.output)
  folder.check()
  prompts = benchmark.judge_prompts(values.judge_prompts) if judge else {}
  demos = benchmark.read(values.data, values.max_prompts)
  import jax

  from dpr_jax import lock
  from dpr_jax.agreement import agree, check_shared
  from dpr_jax.config.values import to_json
  from dpr_jax.data.dataset import fingerprint
  from dpr_jax.loading import load_checkpoint
  from dpr_jax.rollout import Sampling
  from dpr_jax.sharding import barrier
  from dpr_jax.training.integrity import fingerprint as fingerprint_arrays
  from dpr_jax.workdir import versions, write_json, write_lines

  asking = {}
  if not (benchmark.likelihood or benchmark.own_requests):
    with naming("--temperature, --top_k, --top_p"):
      sampling = Sampling(values.temperature, values.top_k, values.top_p)
    asking = {
        "sampling": sampling,
        "samples": values.samples,
        "max_new_tokens": values.max_new_tokens or benchmark.max_new_tokens,
        "stop_strings": (*benchmark.stop_strings, *values.stop),
    }
  with models_cli.model_mesh(values) as (mesh, dtype), contextlib.ExitStack() as held:
    if judge is not None:
      asks = judge.everywhere or jax.process_index() == 0
      agree(lambda: judge.prepare() if asks else None, seconds=120.0)
    agree(
        lambda: held.enter_context(lock.locked(folder.path, "--output")), seconds=2 * lock.STALE
    )
    check_shared(folder.path, f"--output={values.output}")
    lead = jax.process_index() == 0
    loaded = load_checkpoint(values.model, mesh, dtype)
    run = benchmark.run(
        values.data, values.max_prompts, metrics=metrics, loaded=loaded, mesh=mesh,
        template=values.template or loaded.template, demos=demos, batch_size=values.batch_size,
        seed=values.seed, **asking,
    )
    run.check()
    overlap = agree(
        lambda: find_overlap(loaded, demos, values.strict_overlap) if lead else {}, seconds=600
    )
    described = to_json(benchmark)
    settings = {
        "benchmark": described.pop("kind"),
        **{f"benchmark.{name}": value for name, value in described.items()},
        "metrics": list(metrics),
        **{name: getattr(values, name) for name in ("batch_size", "max_prompts", "template")},
        "dtype": dtype,
    }
    if asking:
      generation = {name: getattr(values, name) for name in _GENERATION}
      settings |= {**generation, "max_new_tokens": run.max_new_tokens}
    contents = {
        "data": fingerprint(values.data) if values.data and benchmark.needs_data else "",
        "benchmark": _sources(benchmark),
        "metrics": _sources(*metrics.values()),
        "model": digest(fingerprint_arrays(loaded.variables)),
        # Whatever else decides the prompts: the tokenizer, or a file that the benchmark reads.
        "template, the tokenizer, or a file of the benchmark": run.fingerprint(),
    }
    agree(lambda: None, lambda _: contents)
    folder.claim(settings, contents)
    bar = lambda total: models_cli.bar(f"evaluate {values.benchmark}", total, "response")
    records, asked = fill(run, folder, bar)
    judging = {}
    if judge is not None:
      run, loaded = dataclasses.replace(run, loaded=None), None  # Room for the judge's weights.
      records, judging = judge_responses(
          benchmark, judge, prompts, demos, folder,
          lambda total: models_cli.bar("judge", total, "reply"),
          mesh=mesh, dtype=dtype, batch_size=values.batch_size,
      )
    results = {
        "benchmark": settings["benchmark"],
        "model": values.model,
        **run.results(records),
        "overlap": overlap,
        **({"judge": judging} if judge else {}),
        "settings": {"data": values.data, **settings},
        "versions": versions(*benchmark.packages),
    } if lead else {}
    if judge is not None:
      write_lines(folder.judged_file, [
          {"index": r["index"], "sample": r["sample"], "scores": benchmark.judged(r)}
          for r in records
      ])
    write_json(folder.results_file, results)  # Of process 0.
    barrier("results")  # The scores of some benchmarks take it a while.
  if not lead:
    return
  if not asked and judge is None:
    print(f"{values.output} was finished already")
  print(summary(results, values.output))


def summary(results: Mapping[str, Any], output: str) -> str:
  """The table that ends an evaluation."""
  lines = [f"{results['benchmark']}: {results['n']} prompts"]
  for name, figure in results["metrics"].items():
    column = results["columns"][name]
    scale, unit = (100, "%") if column["unit"] == "%" else (1, column["unit"])
    low, high = (f"{scale * x:.4g}" for x in figure["ci95"])
    lines.append(f"  {column['label']:<34}{scale * figure['mean']:>10.4g} [{low}, {high}] {unit}")
  for c in results.get("comparisons", ()):
    low, high = (f"{100 * x:+.4g}" for x in c["ci95"])
    lines.append(f"  {' - '.join(c['pair']):<34}{100 * c['difference']:>+10.4g} [{low}, {high}] "
                 f"points, p = {c['p']:.2g}")
  return "\n".join([*lines, f"results: {output}/results.json"])


if __name__ == "__main__":
  cli.run_entry_point(main)
