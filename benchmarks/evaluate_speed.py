"""Responses per second of an evaluation, against lm-evaluation-harness on transformers.

    python -m benchmarks.evaluate_speed --model=CKPT --prompts=64 --peer=lm_eval \\
        [--data=test.jsonl] [--peer_python=PYTHON]

Both sides answer the same prompts greedily with the same weights, those of a Hugging Face folder,
to which any other CKPT is exported first. Ours is what `dpr_jax.evaluate` does once the model is
loaded: it answers, scores, and writes responses.jsonl; the peer is `generate_until` of lm_eval's
HFLM. Responses end at EOS on both. `texts_equal` is the share of equal responses, `prompts_equal`
that of prompts with equal token ids.
"""

import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

import tqdm

from benchmarks import common, protocol, rounds
from dpr_jax import cli
from dpr_jax.errors import UserError

PEER = "benchmarks.peers.lm_eval_peer"


def flags():
  parser = common.parser(__doc__, peers=("lm_eval",))
  parser.add_argument("--benchmark", default="gsm8k", help="reads the prompts and scores responses")
  parser.add_argument("--data", default="", help="its file; '' writes problems like those of GSM8K")
  parser.add_argument("--prompts", type=common.positive, default=64, help="the first so many")
  parser.add_argument("--new", type=common.positive, default=128, help="tokens a response at most")
  parser.add_argument("--batch", type=common.positive, default=16, help="responses at a time")
  parser.add_argument("--folder", default="", help="where the weights lie for both sides; '' makes "
                      "a temporary one")
  parser.add_argument("--export", action="store_true", help="only fills --folder")
  return parser


def write_problems(path: pathlib.Path, n: int) -> None:
  """Word problems of very different lengths, in the format of GSM8K."""
  sample, lines = random.Random(0), []
  for _ in range(n):
    steps, total, text = sample.randint(1, 9), sample.randint(2, 90), []
    text.append(f"{sample.choice(['Ada', 'Bo', 'Carla', 'Dmitri'])} has {total} apples.")
    for _ in range(steps):
      more = sample.randint(2, 40)
      total += more
      how = sample.choice(["bought", "found", "picked"])
      text.append(f"On the next day, {more} more are {how}.")
    text.append("How many apples are there in the end?")
    lines.append(json.dumps({"question": " ".join(text), "answer": f"#### {total}"}) + "\n")
  path.write_text("".join(lines))


def export(args) -> None:
  """The weights of --model, or random ones, as a Hugging Face folder."""
  if args.model:
    from dpr_jax import export as entry_point

    entry_point.main([f"--model={args.model}", f"--output={args.folder}"])
    return
  import jax

  from dpr_jax.weights import save_pretrained
  from dpr_jax.weights.byte_tokenizer import byte_tokenizer

  mesh = common.make_mesh(args)
  args.dtype = "float32"
  with jax.set_mesh(mesh):
    model, variables = common.load_model(args, mesh, training=False)
    save_pretrained(args.folder, model.cfg, variables["params"], tokenizer=byte_tokenizer())


class Workload(common.Workload):
  """Variant `main`: a whole evaluation, from prompts to responses.jsonl."""

  def build(self):
    from dpr_jax.config.fields import kind_class
    from dpr_jax.loading import compute_dtype, load_checkpoint

    args = self.args
    self.dtype = compute_dtype(args.dtype)
    self.loaded = load_checkpoint(args.folder, self.mesh, self.dtype)
    self.benchmark = kind_class("dpr_jax.evaluation.benchmarks", args.benchmark)()
    self.demos = self.benchmark.read(args.data, args.prompts)
    self.variants = {"main": self.evaluate}
    run = self.run()
    run.check()
    self.tokens = [prompt.tolist() for prompt in run.prompts]
    lengths = [len(prompt) for prompt in self.tokens]
    return {
        "model": common.model_facts(args, self.loaded.model.cfg),
        "shape": {"prompts": len(self.demos), "new": args.new, "batch": args.batch,
                  "prompt_tokens": [min(lengths), statistics.median(lengths), max(lengths)]},
        "dtype": self.dtype,
    }

  def run(self):
    from dpr_jax.rollout import Sampling

    return self.benchmark.run(
        self.args.data, self.args.prompts, metrics={}, loaded=self.loaded, mesh=self.mesh,
        template=self.loaded.template, demos=self.demos, batch_size=self.args.batch, seed=0,
        sampling=Sampling(temperature=0), max_new_tokens=self.args.new,
    )

  def evaluate(self):
    from dpr_jax.evaluation.benchmark_run import EvaluationFolder, fill

    with tempfile.TemporaryDirectory(prefix="evaluate_speed-") as folder:
      run = self.run()
      self.records, _ = fill(
          run, EvaluationFolder(folder), lambda total: tqdm.tqdm(total=total, disable=True)
      )
      run.results(self.records)

  def finish(self):
    return {
        **super().finish(),
        "texts": [record["response"] for record in self.records],
        "tokens": sum(record["length"] for record in self.records),
        "prompts": self.tokens,
    }


def report(args, sides) -> dict:
  """The JSON line."""
  ours = sides["ours"]
  seconds, n = ours.median("main"), ours.setup["shape"]["prompts"]
  share = lambda a, b: sum(x == y for x, y in zip(a, b, strict=True)) / n
  peers = {}
  for name in args.peers:
    peers[name] = rounds.compare(sides[name], ours, ours.facts["tokens"])
    if "unavailable" not in peers[name]:
      facts = sides[name].facts
      stripped = lambda texts: [text.strip() for text in texts]
      peers[name] |= {
          "responses_per_s": n / peers[name]["seconds"],
          "texts_equal": share(stripped(ours.facts["texts"]), stripped(facts["texts"])),
          "prompts_equal": share(ours.facts["prompts"], facts["prompts"]),
      }
  return {
      "benchmark": "evaluate_speed",
      **{name: ours.setup[name] for name in ("model", "shape", "dtype", "devices")},
      "repeats": args.repeats,
      "seconds": seconds,
      "seconds_all": [r["main"] for r in ours.rounds],
      "responses_per_s": n / seconds,
      "tokens": ours.facts["tokens"],
      "tokens_per_s": ours.facts["tokens"] / seconds,
      "peak_bytes": ours.facts["peak_bytes"],
      "compile_seconds": ours.setup["compile_seconds"]["main"],
      "peers": peers,
  }


def main(argv):
  args = common.parse(flags(), argv)
  if args.worker:
    protocol.serve(lambda: Workload(args))
    return None
  if args.export:
    return export(args)
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  with tempfile.TemporaryDirectory(prefix="evaluate_speed-") as temporary:
    temporary, argv = pathlib.Path(temporary), rounds.strip_peers(argv)
    if not args.data:
      args.data = str(temporary / "problems.jsonl")
      write_problems(pathlib.Path(args.data), args.prompts)
    model = pathlib.Path(args.model).expanduser()
    if args.model and (model / "config.json").is_file() and (model / "tokenizer.json").is_file():
      args.folder = str(model)
    argv = [*argv, f"--data={args.data}"]
    if not args.folder:
      args.folder = str(temporary / "weights")
      # In a process of its own, whose memory is given back; the device stays free.
      made = subprocess.run(
          [sys.executable, "-m", "benchmarks.evaluate_speed", *argv, f"--folder={args.folder}",
           "--export"], env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=protocol.ROOT,
          capture_output=True, text=True,
      )
      if made.returncode:
        raise UserError(f"--model={args.model}: {made.stderr.strip().splitlines()[-1]}")
    argv.append(f"--folder={args.folder}")
    from dpr_jax.config.fields import kind_class

    benchmark = kind_class("dpr_jax.evaluation.benchmarks", args.benchmark)()
    talks = [list(benchmark.prompt(d)) for d in benchmark.read(args.data, args.prompts)]
    (temporary / "prompts.json").write_text(json.dumps(talks))
    task = {"name": "evaluate", "folder": args.folder, "dtype": args.dtype, "new": args.new,
            "batch": args.batch, "prompts": str(temporary / "prompts.json")}
    openers = {"ours": lambda: rounds.open_side("benchmarks.evaluate_speed", argv, args.in_process)}
    for name, python in args.peers.items():
      command = [python, "-m", PEER, f"--task={json.dumps(task)}"]
      openers[name] = lambda command=command: protocol.Process(command)
    sides = rounds.alternate(openers, args.repeats, args.sequential)
  record = {**report(args, sides), "load_average": load, "versions": rounds.versions()}
  print(json.dumps(record), flush=True)
  return record


if __name__ == "__main__":
  cli.run_entry_point(main, sys.argv[1:])
