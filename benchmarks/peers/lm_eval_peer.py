"""lm-evaluation-harness on its own transformers backend: `generate_until` of HFLM, greedily."""

import json
import pathlib

from benchmarks.peers import task as task_lib
from benchmarks.peers import torch_peer


class Evaluate(torch_peer.Workload):
  def __init__(self, task):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    dtype = str(torch_peer.dtype_of(task)).removeprefix("torch.")
    self.model = HFLM(
        pretrained=task["folder"], device=torch_peer.device().type, dtype=dtype,
        batch_size=task["batch"],
    )
    talks = json.loads(pathlib.Path(task["prompts"]).read_text())
    self.prompts = [self.model.apply_chat_template(talk) for talk in talks]
    how = {"until": [], "max_gen_toks": task["new"], "do_sample": False}
    self.requests = [
        Instance("generate_until", {}, (prompt, dict(how)), i)
        for i, prompt in enumerate(self.prompts)
    ]

  def setup(self):
    self.once()
    return {"versions": task_lib.versions("torch", "transformers", "lm_eval")}

  def once(self):
    self.texts = self.model.generate_until(self.requests, disable_tqdm=True)

  def finish(self):
    tokens = [self.model.tok_batch_encode([prompt])[0][0].tolist() for prompt in self.prompts]
    return {**super().finish(), "texts": self.texts, "prompts": tokens}


if __name__ == "__main__":
  task_lib.serve(lambda task: task_lib.pick(task, {"evaluate": Evaluate}))
