"""What all peers share: the task they are given, and random tokens. Standard library only."""

import argparse
import importlib.metadata
import json
import random
from collections.abc import Callable
from typing import Any

from benchmarks import protocol


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
  """Serves make(task); the task comes as JSON in --task.

  Its fields: `name` (sft, score or rollout), `model` (those of a Hugging Face LlamaConfig),
  `dtype` (auto, float32, bfloat16), `seed`, and the sizes of the batch.
  """
  parser = argparse.ArgumentParser()
  parser.add_argument("--task", type=json.loads, required=True)
  task = parser.parse_args().task
  protocol.serve(lambda: make(task))


def pick(task: dict[str, Any], known: dict[str, Any]) -> Any:
  """The workload of the task.

  Raises:
    protocol.Unavailable: there is none.
  """
  if task["name"] not in known:
    raise protocol.Unavailable(f"no {task['name']} here; only {', '.join(known)}")
  return known[task["name"]](task)


def random_rows(task: dict[str, Any], rows: int, length: int) -> list[list[int]]:
  draw = random.Random(task["seed"])
  top = task["model"]["vocab_size"] - 1
  return [[draw.randint(0, top) for _ in range(length)] for _ in range(rows)]


def versions(*packages: str) -> dict[str, str]:
  return {p: importlib.metadata.version(p) for p in packages}
