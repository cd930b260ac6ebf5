"""Every attention backend over whole rows equals a float64 loop over queries.

Splash is interpreted here: it runs the same program as on a TPU, including its blocks and its
backward pass, but with the matmuls of the host.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpr_jax.errors import UserError
from dpr_jax.models import ModelConfig, Transformer, splash
from dpr_jax.models import attention as attention_lib

# Both sides are float32 sums of at most a few hundred terms of order one.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def packed_segments(rng, batch, length):
  """int32 [B, T]: segments 1, 2, ... in order, with padding before, between and after some."""
  out = np.zeros((batch, length), np.int32)
  for row in out:
    at, segment = int(rng.integers(0, 5)), 0
    while at < length:
      segment, size = segment + 1, int(rng.integers(1, length))
      row[at : at + size] = segment
      at += size + int(rng.integers(0, 2) * rng.integers(1, 6))
  return out


def inputs(rng, batch, length, heads, kv_heads, head_dim):
  normal = lambda n: rng.normal(size=(batch, length, n, head_dim)).astype(np.float32)
  return normal(heads), normal(kv_heads), normal(kv_heads), packed_segments(rng, batch, length)


def by_hand(q, k, v, segments, window, scale, d_out):
  """Output and gradients of sum(out * d_out) in float64, one query at a time."""
  out, dq = np.zeros(q.shape), np.zeros(q.shape)
  dk, dv = np.zeros(k.shape), np.zeros(v.shape)
  group = q.shape[2] // k.shape[2]
  q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
  for b, t, n in np.ndindex(q.shape[:3]):
    if not segments[b, t]:
      continue
    seen = [
        s for s in range(t + 1)
        if segments[b, s] == segments[b, t] and (not window or t - s < window)
    ]
    m = n // group
    score = scale * k[b, seen, m] @ q[b, t, n]
    p = np.exp(score - score.max())
    p /= p.sum()
    out[b, t, n] = p @ v[b, seen, m]
    dp = v[b, seen, m] @ d_out[b, t, n]
    d_score = scale * p * (dp - p @ dp)
    dq[b, t, n] = d_score @ k[b, seen, m]
    np.add.at(dk, (b, seen, m), d_score[:, None] * q[b, t, n])
    np.add.at(dv, (b, seen, m), p[:, None] * d_out[b, t, n])
  return out, (dq, dk, dv)


@pytest.fixture
def formula_of_cudnn(monkeypatch):
  """XLA computes what cuDNN would; as in cuDNN, a query that sees no slot gives NaN."""
  fused = jax.nn.dot_product_attention

  def stand_in(*args, mask, implementation=None, **kwargs):
    out_BxTxNxH = fused(*args, mask=mask, implementation="xla", **kwargs)
    if implementation != "cudnn":
      return out_BxTxNxH
    seen_BxT = jnp.any(jnp.tril(mask[:, 0]), axis=-1)
    return jnp.where(seen_BxT[:, :, None, None], out_BxTxNxH, jnp.nan)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


@pytest.mark.parametrize("backend", ["xla", "cudnn", "splash"])
@pytest.mark.parametrize(
    "length, heads, kv_heads, window",
    [(64, 4, 2, 0), (131, 4, 1, 131), (128, 2, 2, 1), (150, 3, 3, 7)],
)
def test_output_and_gradients_equal_a_loop(
    rng, formula_of_cudnn, backend, length, heads, kv_heads, window
):
  q, k, v, segments = inputs(rng, 2, length, heads, kv_heads, 8)
  real = segments != 0
  d_out = rng.normal(size=q.shape).astype(np.float32) * real[:, :, None, None]

  @jax.jit
  def run(q, k, v):
    out, pull = jax.vjp(
        lambda *x: attention_lib.self_attention(
            *x, segments, window=window, scale=0.4, backend=backend
        ),
        q, k, v,
    )
    return out, pull(d_out)

  out, grads = run(q, k, v)
  expected, expected_grads = by_hand(q, k, v, segments, window, 0.4, d_out)
  np.testing.assert_allclose(np.asarray(out)[real], expected[real], **TOLERANCE)
  for got, want in zip(grads, expected_grads):
    np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("backend", ["xla", "cudnn", "splash"])
def test_padding_is_finite_and_reaches_no_token(rng, formula_of_cudnn, backend):
  q, k, v, segments = inputs(rng, 2, 40, 2, 1, 8)
  segments[0] = 0  # A row of padding alone.
  segments[1, :9], segments[1, 30:] = 0, 0
  real = (segments != 0)[:, :, None, None]

  @jax.jit
  def run(q, k, v):
    attend = lambda *x: attention_lib.self_attention(
        *x, segments, window=6, scale=0.4, backend=backend
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(out * real), pull(jnp.ones_like(out))

  out, grads, grads_of_padding = run(q, k, v)
  other = [np.where(real, x, 3 * rng.normal(size=x.shape).astype(x.dtype)) for x in (q, k, v)]
  out_other, grads_other, _ = run(*other)
  assert all(np.isfinite(x).all() for x in (out, out_other, *grads, *grads_of_padding))
  np.testing.assert_array_equal(np.where(real, out, 0), np.where(real, out_other, 0))
  for got, got_other in zip(grads, grads_other):
    np.testing.assert_array_equal(np.where(real, 0, got), 0)
    np.testing.assert_array_equal(got, got_other)


def test_half_precision_splash_is_as_near_to_float64_as_xla(rng):
  """Scores and softmax are float32: only inputs, the scaled q and the output are rounded."""
  q, k, v, segments = inputs(rng, 1, 140, 2, 1, 16)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  exact, _ = by_hand(*(np.asarray(x, np.float32) for x in half), segments, 0, 0.3, np.zeros_like(q))
  real = segments != 0
  error = {}
  for backend in ("xla", "splash"):
    out = attention_lib.self_attention(*half, segments, window=0, scale=0.3, backend=backend)
    assert out.dtype == jnp.bfloat16
    error[backend] = np.abs(np.asarray(out, np.float64)[real] - exact[real]).mean()
  assert error["splash"] < 2 * error["xla"]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "length, heads, kv_heads, window",
    [(64, 4, 2, 0), (131, 4, 1, 131), (128, 2, 2, 1), (150, 3, 3, 7)],
)
def test_cudnn_itself_is_as_near_to_float64_as_xla(
    rng, length, heads, kv_heads, window, head_dim
):
  """Output and gradients, in bfloat16; DPR_JAX_TEST_PLATFORM=cuda runs it on a GPU."""
  if jax.default_backend() != "gpu":
    pytest.skip("needs a GPU")
  q, k, v, segments = inputs(rng, 2, length, heads, kv_heads, head_dim)
  real = segments != 0
  d_out = rng.normal(size=q.shape).astype(np.float32) * real[:, :, None, None]
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, d_out)]
  scale = head_dim**-0.5
  exact, exact_grads = by_hand(
      *(np.asarray(x, np.float32) for x in half[:3]), segments, window, scale,
      np.asarray(half[3], np.float32),
  )

  def errors(backend):
    attend = lambda *x: attention_lib.self_attention(
        *x, segments, window=window, scale=scale, backend=backend
    )
    out, pull = jax.vjp(attend, *half[:3])
    got = [np.asarray(out, np.float64)[real]] + [np.asarray(g, np.float64) for g in pull(half[3])]
    return [np.abs(g - e).mean() for g, e in zip(got, [exact[real], *exact_grads])]

  own, theirs = errors("cudnn"), errors("xla")
  print("mean error of out, dq, dk, dv: cudnn", own, "xla", theirs)
  # With a window of one token the gradients of q and k are exactly zero, as XLA computes them.
  assert all(a < 2 * b + 1e-6 for a, b in zip(own, theirs))


@pytest.mark.parametrize("length", [1, 128, 129, 384, 640, 2048, 2176, 4000])
def test_blocks_divide_a_row_that_is_hardly_longer(length):
  block = splash.block_size(length)
  padded = -(-length // block) * block
  assert block % 128 == 0 and 128 <= block <= 512
  assert padded < length + 128 or padded * 8 <= (length + 127) * 9
  if length >= 4000:
    assert block == 512


@pytest.mark.parametrize("query_scale", [0.1, 0.0], ids=["mild", "sharp"])
def test_a_model_on_splash_equals_the_same_model_on_xla(make_model, neighbours, rng, query_scale):
  fields = dict(layer_pattern=("local", "global"), window=5, num_layers=4, remat="full")
  model, variables = make_model(11, query_scale=query_scale, **fields)
  tokens = rng.integers(0, 29, size=(2, 21)).astype(np.int32)
  segments = packed_segments(rng, 2, 21)
  weight = rng.normal(size=(2, 21, 16)).astype(np.float32) * (segments != 0)[:, :, None]

  def run(backend):
    cfg = ModelConfig.from_dict(model.cfg.to_dict() | {"attention": backend})

    @jax.jit
    def loss(variables):
      hidden, _ = Transformer(cfg).apply(variables, tokens, None, segments)
      return jnp.sum(hidden * weight), hidden

    def both(variables):
      (_, hidden), grads = jax.value_and_grad(loss, has_aux=True)(variables)
      flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
      return np.asarray(hidden)[segments != 0], flat

    return both

  hidden, grads = run("xla")(variables)
  hidden_splash, grads_splash = run("splash")(variables)
  if query_scale:  # Float32 rounding, carried through four layers.
    np.testing.assert_allclose(hidden_splash, hidden, rtol=1e-4, atol=1e-4)
    scale = np.abs(grads).max()
    np.testing.assert_allclose(grads_splash, grads, rtol=1e-4, atol=1e-5 * scale)
  else:  # Attention is so sharp that perturbed weights must set the scale of rounding errors.
    hidden_beside, grads_beside = run("xla")(neighbours(variables))
    apart = lambda a, b: np.linalg.norm(a - b)
    assert apart(hidden_splash, hidden) < 4 * apart(hidden_beside, hidden) < 1e-2 * apart(hidden, 0)
    assert apart(grads_splash, grads) < 4 * apart(grads_beside, grads) < 1e-2 * apart(grads, 0)


@contextlib.contextmanager
def platform(name, mesh=(1, 1, 1)):
  """Sets a mesh of abstract devices, as ahead-of-time compilation does."""
  device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=name)
  mesh = jax.sharding.AbstractMesh(
      mesh, ("data", "fsdp", "tensor"),
      (jax.sharding.AxisType.Auto,) * 3, abstract_device=device,
  )
  with jax.sharding.use_abstract_mesh(mesh):
    yield


@pytest.mark.parametrize(
    "name, fields, length, backend",
    [
        ("cpu", dict(dtype="bfloat16"), 512, "xla"),
        ("gpu", dict(dtype="bfloat16"), 7, "cudnn"),
        ("gpu", dict(dtype="float32"), 512, "xla"),
        ("gpu", dict(dtype="bfloat16", head_dim=256), 512, "xla"),
        ("gpu", dict(dtype="bfloat16", head_dim=256, attention="cudnn"), 512, "cudnn"),
        ("gpu", dict(dtype="bfloat16", head_dim=12), 512, "xla"),
        ("gpu", dict(dtype="bfloat16", attention="xla"), 512, "xla"),
        ("tpu", dict(dtype="float32"), 128, "splash"),
        ("tpu", dict(dtype="bfloat16", head_dim=256), 2048, "splash"),
        ("tpu", dict(dtype="bfloat16"), 127, "xla"),
        ("tpu", dict(attention="splash"), 127, "splash"),
        ("tpu", dict(attention="xla"), 512, "xla"),
        ("cpu", dict(attention="splash"), 2, "splash"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_where_it_fits(name, fields, length, backend):
  with platform(name):
    assert attention_lib.resolve_backend(ModelConfig(**fields), length) == backend


@pytest.mark.parametrize(
    "name, fields, complaint",
    [
        ("tpu", dict(attention="cudnn", dtype="bfloat16"), "cudnn needs a GPU, and this is a TPU"),
        ("cpu", dict(attention="cudnn", dtype="bfloat16"), "cudnn needs a GPU, and this is a CPU"),
        ("gpu", dict(attention="cudnn"), "cudnn needs dtype=bfloat16, not float32"),
        ("gpu", dict(attention="cudnn", dtype="bfloat16", head_dim=512),
         "cudnn needs a head_dim of at most 256, a multiple of 8, not 512"),
        ("gpu", dict(attention="splash"), "splash needs a TPU, and this is a GPU"),
    ],
)
def test_an_unavailable_backend_is_refused_by_name(name, fields, complaint):
  with platform(name), pytest.raises(UserError, match=f"^attention={complaint}; auto"):
    attention_lib.resolve_backend(ModelConfig(**fields), 512)


def test_without_a_mesh_the_platform_is_that_of_the_host():
  assert attention_lib.target_platform() == "cpu"
  with pytest.raises(ValueError, match="attention='flash' is not one of"):
    ModelConfig(attention="flash")


def test_a_training_step_for_gpu_calls_cudnn(monkeypatch):
  """The step is only lowered, because the tests run without CUDA."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  from dpr_jax.models import init_variables

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
  cfg = ModelConfig(
      num_layers=2, layer_pattern=("local", "global"), window=9, num_kv_heads=1,
      dtype="bfloat16",
  )
  with platform("gpu", mesh=(1, 2, 2)):
    variables = jax.eval_shape(lambda key: init_variables(cfg, key), jax.random.key(0))

    def loss(variables, tokens, segments):
      hidden, _ = Transformer(cfg).apply(variables, tokens, None, segments)
      return jnp.sum(hidden.astype(jnp.float32))

    rows = jax.ShapeDtypeStruct((4, 63), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(variables, rows, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  forward = next(line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmax(" in line)
  # Per device: 2 rows, 64 slots (63 padded), 2 of 4 query heads and the only KV head.
  assert "(tensor<2x64x2x32xbf16>, tensor<2x64x1x32xbf16>, tensor<2x64x1x32xbf16>," in forward
  assert "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
