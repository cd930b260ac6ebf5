"""What decides the result of a run from outside of its config: tokenizer, template, weights, rows.

A run copies its tokenizer, with the chat template that it trains with, to its workdir; resumed runs
and whatever uses a stage read that copy. Of the rest, config.json holds fingerprints.
"""

import datetime
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpr_jax import fingerprints, weights
from dpr_jax.errors import UserError, naming
from dpr_jax.paths import Path, as_path, on_disk, upload
from dpr_jax.weights import peft
from dpr_jax.weights.byte_tokenizer import byte_tokenizer

PRETRAINED, TEMPLATE, ROWS = "config.model.pretrained", "config.data.template", "config.data"
_WEIGHTS, _TEXTS = (".safetensors", ".gguf"), (".json", ".jinja")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def today() -> datetime.date:
  """The date, the same on hosts of different time zones."""
  return datetime.datetime.now(datetime.timezone.utc).date()


def dated(template: str, day: datetime.date) -> str:
  """A chat template that always writes `day`, where it would write the date of its rendering."""
  return _DATE.sub(lambda call: json.dumps(day.strftime(call[2])), template)


def make_tokenizer(pretrained: str, template: str, day: datetime.date) -> Any:
  """The tokenizer of a run, with the chat template that it trains with.

  Args:
    pretrained: path of the weights; "" takes the byte tokenizer.
    template: path of a .jinja file that replaces the tokenizer's own, or "".
    day: the date that the template writes, if it writes any.
  """
  tokenizer = weights.load_tokenizer(pretrained) if pretrained else byte_tokenizer()
  if template:
    path = as_path(template)
    if not path.is_file():
      raise UserError(f"{TEMPLATE}={template}: no such file; expected a .jinja file, or '' for the "
                      "tokenizer's own")
    with naming(f"{TEMPLATE}={template}"):
      tokenizer.chat_template = path.read_text(encoding="utf-8")
  own = tokenizer.chat_template
  if isinstance(own, str):
    tokenizer.chat_template = dated(own, day)
  elif isinstance(own, dict):
    tokenizer.chat_template = {name: dated(text, day) for name, text in own.items()}
  return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> list[Path]:
  """Writes a tokenizer, each file atomically; returns the files."""
  with tempfile.TemporaryDirectory(prefix="dpr_jax-") as temporary:
    tokenizer.save_pretrained(temporary)
    return upload(pathlib.Path(temporary), folder)


def pretrained_files(
    path: str | os.PathLike, suffixes: tuple[str, ...] = _WEIGHTS + _TEXTS
) -> dict[str, str]:
  """Name -> fingerprint of what is read of pretrained weights; of an adapter, its base too."""
  place = on_disk(path).expanduser()
  files = [place] if place.is_file() else place.iterdir()
  out = fingerprints.of_files(p for p in files if p.suffix in suffixes and p.is_file())
  if (place / peft.CONFIG).is_file():
    base = pretrained_files(peft.Adapter(place).base, suffixes)
    out |= {f"base/{name}": value for name, value in base.items()}
  return out


def collect(
    pretrained: str, template: str, day: datetime.date, rows: Mapping[str, Any], then: Any = None
) -> dict[str, Any]:
  """The `inputs` of config.json: fingerprints by the field that names what they are of, and day.

  Args:
    rows: arrays, or lists of arrays, of what is trained and evaluated on.
    then: the inputs when the run began; a template that has moved since is not looked at.
  """
  out: dict[str, Any] = {"date": day.isoformat()}
  if pretrained:
    out[PRETRAINED] = pretrained_files(pretrained)
  if template:
    there = as_path(template).is_file()
    out[TEMPLATE] = fingerprints.of_file(template) if there else (then or {}).get(TEMPLATE)
  parts = [np.ascontiguousarray(x).tobytes() for v in rows.values()
           for x in (v if isinstance(v, list) else [v])]
  out[ROWS] = fingerprints.of_bytes("".join(map(fingerprints.of_bytes, parts)).encode())
  return out


def check_base(record: Mapping[str, Any]) -> None:
  """Raises UserError where the weights under a LoRA stage are not those it was trained on.

  Args:
    record: the config.json of its run.
  """
  path, then = record["model"]["pretrained"], record.get("inputs", {}).get(PRETRAINED)
  if not path or then is None:
    return
  now = pretrained_files(path, _WEIGHTS) if as_path(path).exists() else {}
  for name in sorted(n for n in {*then, *now} if n.endswith(_WEIGHTS)):
    if then.get(name) != now.get(name):
      raise UserError(
          f"{path}: {name} is not the file that the LoRA stage was trained on ({then.get(name)} "
          f"then, {now.get(name)} now); restore the weights of that run"
      )
