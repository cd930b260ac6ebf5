"""Chunks of logits fit the budget of every device, however a mesh splits rows and vocabulary.

The program below runs in a process of its own; see conftest.py.
"""


def largest_shards(cases, budget):
  """(columns, bytes of the largest shard of their logits, the same of one column more) of each."""
  import jax
  import jax.numpy as jnp

  from dpr_jax import sharding
  from dpr_jax.models import ModelConfig
  from dpr_jax.models.embedding import logits_axes
  from dpr_jax.models.logprobs import chunk_columns

  def largest(*shape):
    make = jax.jit(lambda: sharding.constrain(jnp.zeros(shape), *logits_axes(*shape)))
    return max(shard.data.nbytes for shard in make().addressable_shards)

  found = []
  for mesh, rows, vocab_size in cases:
    cfg = ModelConfig(vocab_size=vocab_size, logits_budget=budget / 2**30)
    with jax.set_mesh(sharding.make_mesh(*mesh)):
      columns = chunk_columns(cfg, rows)
      sizes = [largest(rows, c, vocab_size) for c in (columns, columns + 1)]
      found.append((columns, *sizes, logits_axes(rows, columns, vocab_size)[-1]))
  return found


def test_the_logits_of_a_chunk_fill_the_budget_of_each_device(run_on_devices):
  cases = [
      ((8, 1, 1), 16, 96),
      ((2, 2, 2), 16, 96),  # Rows over four devices, the vocabulary over two.
      ((2, 2, 2), 16, 4096),  # The head is split over fsdp instead of gathered.
      ((1, 1, 8), 3, 96),
      ((1, 4, 2), 6, 96),  # Six rows are not split over four devices.
      ((1, 2, 4), 4, 90),  # Nor 90 ids over four.
  ]
  budget = 200_000  # Bytes; three arrays of a chunk.
  results = run_on_devices(largest_shards, cases, budget).result
  assert [axis for *_, axis in results].count("fine_vocab") == 1
  for case, (columns, size, more, _) in zip(cases, results, strict=True):
    assert columns > 1 and 3 * size <= budget < 3 * more, case
