"""Evaluation prompts that are among the demonstrations that the evaluated model was trained on."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from dpr_jax.config.sections import DataSection
from dpr_jax.config.values import build
from dpr_jax.data.dataset import fingerprint, split_demos
from dpr_jax.data.demos import Demo, prompt_key, text_key
from dpr_jax.errors import UserError
from dpr_jax.loading import LoadedModel
from dpr_jax.workdir import Workdir

_log = logging.getLogger(__name__)
_SHOWN = 5


def _training_demos(loaded: LoadedModel) -> tuple[str, list[Demo]]:
  """(where they are from, the demonstrations) that a stage of a workdir was trained on.

  Raises:
    UserError: they are not known, or no longer there.
  """
  if loaded.workdir is None:
    raise UserError("only a stage of a workdir names its demonstrations")
  record = Workdir(loaded.workdir).read_config()
  section = build(DataSection, record["config"]["data"], "data.")
  if section.demos:
    there = pathlib.Path(section.demos).exists()
    if not there or fingerprint(section.demos) != record["data"]["blake2b"]:
      raise UserError(f"config.data.demos={section.demos} of {loaded.workdir} is not the file of "
                      "that run any more" if there else
                      f"config.data.demos={section.demos} of {loaded.workdir}: no such file here")
  return section.demos or "built-in tasks", split_demos(section, record["seed"])[0]


def find_overlap(loaded: LoadedModel, demos: Sequence[Demo], strict: bool) -> dict[str, Any]:
  """Compares prompts by `prompt_key`: the first user turn, case and spacing ignored.

  Returns:
    What results.json says: `demos`, `count`, and the sources of the `first` few on both sides; or
    `unknown`, the reason.

  Raises:
    UserError: with `strict`, where there is an overlap, or it is unknown.
  """
  try:
    origin, trained = _training_demos(loaded)
  except UserError as e:
    if strict:
      raise UserError(f"--strict_overlap: the training demonstrations are unknown: {e}") from None
    return {"unknown": str(e)}
  seen = {prompt_key(demo): demo.source for demo in trained}
  found = []
  for i, demo in enumerate(demos):
    # A document of another library has its question in one of its fields.
    texts = [x for x in demo.meta.get("doc", {}).values() if isinstance(x, str)]
    keys = [key for key in (prompt_key(demo), *map(text_key, texts)) if key in seen]
    if keys:
      found.append({"prompt": demo.source or f"prompt {i + 1}", "demo": seen[keys[0]]})
  if found:
    line = (f"{len(found)} of {len(demos)} prompts are among the demonstrations of the model; the "
            f"first, {found[0]['prompt']}, is {found[0]['demo']}")
    if strict:
      raise UserError(f"--strict_overlap: {line}")
    _log.warning("%s", line)
  return {"demos": origin, "count": len(found), "first": found[:_SHOWN]}
