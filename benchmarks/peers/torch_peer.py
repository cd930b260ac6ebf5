"""transformers on torch: a plain training loop, a scoring pass, `generate`.

Random weights of the shape. bfloat16 means autocast over float32 weights for training, and
bfloat16 weights otherwise, as we do.
"""

import contextlib
import time

from benchmarks import protocol
from benchmarks.peers import task as task_lib


def device():
  import torch

  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(task):
  import torch

  if task["dtype"] == "auto":
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
  return getattr(torch, task["dtype"])


def make_model(task, dtype):
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  config = LlamaConfig(**task["model"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
  torch.manual_seed(task["seed"])
  return LlamaForCausalLM(config).to(device=device(), dtype=dtype)


def synchronize():
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def peak_bytes():
  import torch

  if torch.cuda.is_available():
    return torch.cuda.max_memory_allocated()
  return protocol.peak_host_bytes()


class Workload:
  """`once` is one call of what is timed."""

  def setup(self):
    return {
        "compile_seconds": protocol.warm_up(self.timed),
        "versions": task_lib.versions("torch", "transformers"),
    }

  def timed(self):
    start = time.perf_counter()
    self.once()
    synchronize()
    return time.perf_counter() - start

  def round(self):
    return {"main": self.timed()}

  def finish(self):
    return {"peak_bytes": peak_bytes()}


class Sft(Workload):
  def __init__(self, task):
    import torch

    self.model = make_model(task, torch.float32).train()
    self.optimizer = torch.optim.AdamW(
        self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
    )
    rows = task_lib.random_rows(task, task["batch"], task["length"])
    self.tokens = torch.tensor(rows, device=device())
    dtype = dtype_of(task)
    self.autocast = (
        contextlib.nullcontext if dtype == torch.float32
        else lambda: torch.autocast(device().type, dtype)
    )

  def once(self):
    import torch

    with self.autocast():
      loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.item()


class Score(Workload):
  def __init__(self, task):
    import torch

    self.model = make_model(task, dtype_of(task)).eval()
    rows = task_lib.random_rows(task, task["batch"], task["length"])
    self.tokens = torch.tensor(rows, device=device())

  def once(self):
    import torch

    with torch.inference_mode():
      logits = self.model(input_ids=self.tokens, use_cache=False).logits[:, :-1].float()
      target = logits.gather(-1, self.tokens[:, 1:, None])[..., 0]
      return target - torch.logsumexp(logits, dim=-1)


class Generate(Workload):
  """Samples at temperature 1 from the whole vocabulary; every row gets all its tokens."""

  def __init__(self, task):
    import torch

    self.model = make_model(task, dtype_of(task)).eval()
    self.new = task["new"]
    rows = task_lib.random_rows(task, task["batch"], task["prompt"])
    self.tokens = torch.tensor(rows, device=device())

  def once(self):
    import torch

    with torch.inference_mode():
      out = self.model.generate(
          self.tokens, attention_mask=torch.ones_like(self.tokens), do_sample=True,
          temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=self.new, max_new_tokens=self.new,
      )
    assert out.shape[1] == self.tokens.shape[1] + self.new
    return out


if __name__ == "__main__":
  task_lib.serve(
      lambda task: task_lib.pick(task, {"sft": Sft, "score": Score, "rollout": Generate})
  )
