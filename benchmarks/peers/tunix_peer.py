"""Tunix's Llama 3 model in its PeftTrainer, its log-prob function, and its Sampler."""

import time

from benchmarks import protocol
from benchmarks.peers import task as task_lib


def dtype_of(task):
  import jax

  if task["dtype"] == "auto":
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return task["dtype"]


def make_model(task, dtype):
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from tunix.models.llama3 import model as llama3

  shape = task["model"]
  config = llama3.ModelConfig(
      num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"],
      embed_dim=shape["hidden_size"], hidden_dim=shape["intermediate_size"],
      num_heads=shape["num_attention_heads"], head_dim=shape["head_dim"],
      num_kv_heads=shape["num_key_value_heads"],
      rope_theta=int(shape["rope_parameters"]["rope_theta"]),  # Not scaled: its speed is the same.
      norm_eps=shape["rms_norm_eps"], weight_tying=shape["tie_word_embeddings"],
  )
  model = llama3.Llama3(config, rngs=nnx.Rngs(params=task["seed"]))
  if dtype != "float32":
    state = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), nnx.state(model))
    nnx.update(model, state)
  return model


def one_device():
  """A mesh of one device: the model names axes `fsdp` and `tp`."""
  import jax

  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((1, 1), ("fsdp", "tp"), devices=jax.devices()[:1], axis_types=auto)


def peak_bytes():
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use") or protocol.peak_host_bytes()


def versions():
  return task_lib.versions("google-tunix", "jax", "flax")


class Sft:
  """The weights are float32, and so is the arithmetic: its Llama computes in their dtype."""

  def __init__(self, task):
    self.task = task

  def train(self, stepped):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.sft import peft_trainer

    task = self.task
    rows = np.asarray(task_lib.random_rows(task, task["batch"], task["length"]), np.int32)
    with one_device():
      model = make_model(task, "float32" if dtype_of(task) == "float32" else "bfloat16")
      optimizer = optax.chain(
          optax.clip_by_global_norm(1.0), optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.0)
      )
      trainer = peft_trainer.PeftTrainer(
          model, optimizer,
          peft_trainer.TrainingConfig(
              eval_every_n_steps=10**9, max_steps=10**6, max_inflight_computations=1,
              pbar_description=None,
          ),
      )

      def model_input(batch):
        length = batch.input_tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        positions = jnp.broadcast_to(jnp.arange(length), batch.input_tokens.shape)
        return {
            "input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
            "positions": positions,
            "attention_mask": jnp.broadcast_to(causal, (len(rows), length, length)),
        }

      trainer = trainer.with_gen_model_input_fn(model_input)

      def batches():
        # The trainer asks for the next batch when the step before is under way.
        started = False
        while True:
          if started:
            jax.block_until_ready(nnx.state(trainer.model))
            stepped.end()
          stepped.begin()
          started = True
          yield peft_trainer.TrainingInput(
              input_tokens=rows, input_mask=np.ones(rows.shape, np.bool_)
          )

      trainer.train(batches())

  def setup(self):
    import tunix  # noqa: F401  Missing packages must show here, not in the thread.

    self.stepped = protocol.Stepped(self.train)
    return {"compile_seconds": protocol.warm_up(self.stepped.round), "versions": versions()}

  def round(self):
    return {"main": self.stepped.round()}

  def finish(self):
    return {"peak_bytes": peak_bytes()}


class Timed:
  """`once` is one call of what is timed."""

  def setup(self):
    return {"compile_seconds": protocol.warm_up(self.timed), "versions": versions()}

  def timed(self):
    start = time.perf_counter()
    with one_device():
      self.once()
    return time.perf_counter() - start

  def round(self):
    return {"main": self.timed()}

  def finish(self):
    return {"peak_bytes": peak_bytes()}


class Score(Timed):
  """Its per-token log-probs, of all tokens but the first."""

  def __init__(self, task):
    import jax
    import numpy as np
    from flax import nnx
    from tunix.rl import common

    with one_device():
      self.graphdef, self.state = nnx.split(make_model(task, dtype_of(task)))
    rows = np.asarray(task_lib.random_rows(task, task["batch"], task["length"]), np.int32)
    self.prompt, self.completion = rows[:, :1], rows[:, 1:]
    self.score = jax.jit(
        lambda state, prompt, completion: common.compute_per_token_logps(
            self.graphdef, state, prompt, completion, pad_id=-1, eos_id=-1
        )
    )

  def once(self):
    import jax

    jax.block_until_ready(self.score(self.state, self.prompt, self.completion))


class Tokens:
  """Stands for a tokenizer: a prompt is written as its ids."""

  def encode(self, text, **kwargs):
    return [int(x) for x in text.split()]

  def decode(self, ids, **kwargs):
    return ""

  def bos_id(self):
    return 1

  def eos_id(self):
    return 2

  def pad_id(self):
    return 0


class Generate(Timed):
  """Samples at temperature 1; no token ends a response, so every row gets all its tokens."""

  def __init__(self, task):
    from tunix.generate import sampler

    shape = task["model"]
    self.task = task
    # The sampler puts the first token of a text in front.
    rows = task_lib.random_rows(task, task["batch"], task["prompt"] - 1)
    self.prompts = [" ".join(map(str, (max(t, 3) for t in row))) for row in rows]
    with one_device():
      self.sampler = sampler.Sampler(
          make_model(task, dtype_of(task)), Tokens(),
          sampler.CacheConfig(
              cache_size=task["prompt"] + task["new"] + 1,
              num_layers=shape["num_hidden_layers"],
              num_kv_heads=shape["num_key_value_heads"], head_dim=shape["head_dim"],
          ),
      )

  def once(self):
    task = self.task
    out = self.sampler(
        self.prompts, max_generation_steps=task["new"], max_prompt_length=task["prompt"],
        temperature=1.0, top_p=1.0, seed=task["seed"],
        eos_tokens=[task["model"]["vocab_size"] + 1],
    )
    lengths = {len(x) for x in out.tokens}
    assert lengths == {task["new"]}, lengths


if __name__ == "__main__":
  task_lib.serve(
      lambda task: task_lib.pick(task, {"sft": Sft, "score": Score, "rollout": Generate})
  )
