"""The decoder computes the same function for cached, padded and packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.models import ModelConfig, Rope, init_cache, init_variables

# Every feature of the decoder is enabled in one of these.
SHAPES = {
    "grouped": {},
    "windowed": dict(
        num_layers=5, layer_pattern=("local", "local", "global"), window=3, norm_unit_offset=True,
        sandwich_norm=True, qk_norm=True, embed_scale=4.0, query_scale=0.3, activation="gelu_tanh",
        local_rope=Rope(theta=100.0), rope=Rope(theta=1e4, scaling="linear", factor=4.0),
    ),
    "biased": dict(qkv_bias=True, tied_head=False, num_kv_heads=4, remat="dots"),
    "one_kv_head": dict(num_kv_heads=1, layer_pattern=("local",), window=4, remat="none"),
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def model(request, make_model, rng):
  return make_model(int(rng.integers(1 << 30)), **SHAPES[request.param])


# Jitted once per model: an eager call compiles every operation.
forward = jax.jit(
    lambda model, variables, tokens, segments, cache: model.apply(
        variables, tokens, None, segments, cache
    ),
    static_argnums=0,
)

WIDTH = 16


def _rows(rng, model, lengths):
  return [rng.integers(0, model.cfg.vocab_size, n).astype(np.int32) for n in lengths]


def _alone(model, variables, rows):
  """Hidden states of each row run alone, as the start of a full row without padding."""
  out = []
  for row in rows:
    tokens = np.resize(row, (1, WIDTH)).astype(np.int32)  # The tail does not affect the start.
    out.append(np.asarray(forward(model, variables, tokens, None, None)[0][0, : len(row)]))
  return out


def _layout(rows, width, left):
  tokens, segments = np.zeros((2, len(rows), width), np.int32)
  for b, row in enumerate(rows):
    at = slice(width - len(row), width) if left else slice(0, len(row))
    tokens[b, at], segments[b, at] = row, 1
  return tokens, segments


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(model, rng, left):
  model, variables = model
  rows = _rows(rng, model, (9, 4, 1, 7))
  tokens, segments = _layout(rows, WIDTH, left)
  # The tokens in the padding must not matter.
  tokens = np.where(segments == 0, rng.integers(0, model.cfg.vocab_size, tokens.shape), tokens)
  hidden = np.asarray(forward(model, variables, tokens.astype(np.int32), segments, None)[0])
  for b, alone in enumerate(_alone(model, variables, rows)):
    np.testing.assert_allclose(hidden[b, segments[b] == 1], alone, atol=2e-5)


def test_packed_rows_equal_separate_rows(model, rng):
  model, variables = model
  rows = _rows(rng, model, (4, 6, 1, 3))
  packed = np.concatenate([*rows, [7, 7]])[None].astype(np.int32)
  segments = np.repeat([1, 2, 3, 4, 0], [4, 6, 1, 3, 2])[None].astype(np.int32)
  hidden = np.asarray(forward(model, variables, packed, segments, None)[0][0])
  for i, alone in enumerate(_alone(model, variables, rows)):
    np.testing.assert_allclose(hidden[segments[0] == i + 1], alone, atol=2e-5)


@pytest.mark.parametrize("step", [1, 2], ids=["one_token", "two_tokens"])
def test_cached_decode_equals_the_full_forward(model, rng, step):
  model, variables = model
  prompts, total = (6, 2, 5), 8
  rows = _rows(rng, model, [p + total for p in prompts])
  full = _alone(model, variables, rows)
  tokens, segments = _layout([r[:p] for r, p in zip(rows, prompts)], 6, left=True)
  cache = init_cache(model.cfg, 3, 6 + total + 3)  # more slots than are used.
  hidden, cache = forward(model, variables, tokens, segments, cache)
  for b, p in enumerate(prompts):
    np.testing.assert_allclose(hidden[b, 6 - p :], full[b][:p], atol=2e-5)
  for t in range(0, total, step):
    new = np.stack([r[p + t : p + t + step] for r, p in zip(rows, prompts)])
    hidden, cache = forward(model, variables, new, np.ones_like(new), cache)
    for b, p in enumerate(prompts):
      np.testing.assert_allclose(hidden[b], full[b][p + t : p + t + step], atol=2e-5)
  np.testing.assert_array_equal(cache.lengths, [p + total for p in prompts])
  assert int(cache.index) == 6 + total


def test_a_finished_row_does_not_disturb_the_others(model, rng):
  """A row whose new token has segment 0 neither stores it nor advances."""
  model, variables = model
  prompt = np.stack(_rows(rng, model, (4, 4)))
  column = lambda *x: np.asarray(x, np.int32)[:, None]
  cache = init_cache(model.cfg, 2, 8)
  _, cache = forward(model, variables, prompt, np.ones_like(prompt), cache)
  _, cache = forward(model, variables, column(3, 3), column(1, 0), cache)
  np.testing.assert_array_equal(cache.lengths, [5, 4])
  hidden, _ = forward(model, variables, column(5, 5), column(1, 1), cache)
  first, second = _alone(
      model, variables, [np.append(prompt[0], [3, 5]), np.append(prompt[1], [5])]
  )
  np.testing.assert_allclose(hidden[0, 0], first[-1], atol=2e-5)
  # A gap in the slots does not shorten a window, because windows count tokens.
  np.testing.assert_allclose(hidden[1, 0], second[-1], atol=2e-5)


def test_future_tokens_are_not_seen(model, rng):
  model, variables = model
  (row,) = _rows(rng, model, (10,))
  changed = row.copy()
  changed[6] = (changed[6] + 1) % model.cfg.vocab_size
  a, b = _alone(model, variables, [row, changed])
  np.testing.assert_array_equal(a[:6], b[:6])
  assert np.abs(a[6:] - b[6:]).max() > 1e-3


def test_a_window_hides_what_is_further_away(make_model, rng):
  model, variables = make_model(1, num_layers=1, layer_pattern=("local",), window=3)
  (row,) = _rows(rng, model, (9,))
  changed = row.copy()
  changed[2] = (changed[2] + 1) % model.cfg.vocab_size
  a, b = _alone(model, variables, [row, changed])
  np.testing.assert_allclose(a[5:], b[5:], atol=1e-6)
  assert np.abs(a[4] - b[4]).max() > 1e-4


def test_the_remat_policy_does_not_change_gradients(make_model, rng):
  tokens = rng.integers(0, 29, (2, 7)).astype(np.int32)
  grads = []
  for remat in ("none", "dots", "full"):
    model, variables = make_model(3, remat=remat, num_layers=1)
    loss = lambda v, m=model: jnp.sum(jnp.square(m.apply(v, tokens)[0]) ** 1.5)
    grads.append(jax.jit(jax.grad(loss))(variables))
  for other in grads[1:]:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, grads[0], other)


def test_num_params_counts_the_tree(model):
  model, variables = model
  assert model.cfg.num_params == sum(x.size for x in jax.tree.leaves(variables))


def test_every_parameter_names_its_axes():
  cfg = ModelConfig(vocab_size=8, num_layers=3, layer_pattern=("local", "global"), window=2,
                    qkv_bias=True, qk_norm=True, sandwich_norm=True, tied_head=False)
  boxed = jax.eval_shape(lambda k: init_variables(cfg, k), jax.random.key(0))
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names"))
  assert all(len(x.names) == x.value.ndim for x in leaves)
  stacked = [x.names for x in leaves if x.value.ndim > 2]
  assert stacked and all(names[0] == "layers" for names in stacked)


def test_config_round_trips_and_refuses_bad_values():
  import json

  cfg = ModelConfig(**SHAPES["windowed"], vocab_size=9)
  assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
  assert cfg.groups == ((("local", "local", "global"), 1), (("local", "local"), 1))
  for bad in (
      dict(num_heads=4, num_kv_heads=3), dict(layer_pattern=("local",)), dict(layer_pattern=()),
      dict(layer_pattern=("sideways",)), dict(activation="relu"), dict(remat="some"),
  ):
    with pytest.raises(ValueError, match=next(iter(bad)) if len(bad) == 1 else "num_heads"):
      ModelConfig(**bad)


@pytest.mark.parametrize("new", [8, 2])
def test_decoding_after_a_prefill_equals_the_full_forward(model, rng, new):
  model, variables = model
  prompts = (6, 2, 5, 1)
  rows = _rows(rng, model, [p + new for p in prompts])
  full = _alone(model, variables, rows)
  tokens, segments = _layout([r[:p] for r, p in zip(rows, prompts)], 6, left=True)
  prefill = jax.jit(lambda v, t, s: model.apply(v, t, s, slots=new, method="prefill"))
  hidden, cache = prefill(variables, tokens, segments)
  for b, p in enumerate(prompts):
    np.testing.assert_allclose(hidden[b, 6 - p :], full[b][:p], atol=2e-5)
  for t in range(new):
    column = np.stack([r[p + t : p + t + 1] for r, p in zip(rows, prompts)])
    hidden, cache = forward(model, variables, column, np.ones_like(column), cache)
    for b, p in enumerate(prompts):
      np.testing.assert_allclose(hidden[b, 0], full[b][p + t], atol=2e-5)


def test_a_prefilled_cache_keeps_no_more_than_the_window_of_local_layers(make_model):
  model, variables = make_model(
      0, num_layers=3, layer_pattern=("local", "local", "global"), window=4
  )
  tokens = np.ones((2, 9), np.int32)
  _, cache = jax.eval_shape(
      lambda v, t: model.apply(v, t, t, slots=5, method="prefill"), variables, tokens
  )
  slots = [[kv[0].shape[-2] for kv in group] for group in cache.kv]
  assert slots == [[4, 4, 14]]


def test_more_tokens_than_a_ring_holds_leave_the_last_ones(make_model, rng):
  """Four tokens for two slots after a prompt: each slot is written once, by the newest token."""
  model, variables = make_model(int(rng.integers(1 << 30)))
  tokens = rng.integers(0, model.cfg.vocab_size, (2, 6)).astype(np.int32)
  prompt, more = tokens[:, :2], tokens[:, 2:]
  ones = np.ones_like
  _, cache = model.apply(variables, prompt, ones(prompt), slots=2, method="prefill")
  hidden, cache = forward(model, variables, more, ones(more), cache)
  full = np.asarray(forward(model, variables, tokens, ones(tokens), None)[0])
  np.testing.assert_allclose(hidden, full[:, 2:], atol=2e-5)  # Each saw all tokens before it.
  np.testing.assert_array_equal(cache.slots["global"].ranks, [[0, 1, 4, 5]] * 2)
