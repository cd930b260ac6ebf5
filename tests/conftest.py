"""Settings and small fixtures of every test. The environment is set before jax is imported."""

import atexit
import http
import os
import shutil
import signal
import sys
import tempfile

# Some tests ask for a GPU and skip without one: DPR_JAX_TEST_PLATFORM=cuda pytest tests/models.
os.environ["JAX_PLATFORMS"] = os.environ.get("DPR_JAX_TEST_PLATFORM", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# Most of the time of these tests is the compiler's: the same programs, hardly optimised, here and
# in each process that a test starts. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And compiled once, for all workers and the processes that they start: as in a run of a user, who
# has such a folder in the workdir. It ends with the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpr_jax_compiled_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
  """Fresh random inputs: another seed every run, printed when a test fails.

  DPR_JAX_TEST_SEED repeats a run.
  """
  seed = int(os.environ.get("DPR_JAX_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
  print(f"DPR_JAX_TEST_SEED={seed}")
  return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
  """Shells start what runs in the background with SIGINT ignored, and tests send it."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
  """Compiled programs map memory; beyond the 65,530 maps of a Linux process XLA crashes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def bucket():
  """gs://bucket of a Google Cloud Storage on loopback, in memory; also for processes that start.

  The emulator passes over conditions on the generation of an object, and does not tell it with the
  content, as Google does; both are added. Its server answers one request at a time.
  """
  import logging
  import socket

  from gcp_storage_emulator import exceptions, server

  from dpr_jax.paths import as_path

  def conditional(handle):
    def handled(request, response, storage):
      name = request.params.get("object_id") or request.query.get("name", [""])[0]
      try:
        generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
      except exceptions.NotFound:
        generation = "0"
      if request.query.get("ifGenerationMatch", [generation]) != [generation]:
        response.status = http.HTTPStatus.PRECONDITION_FAILED
        return
      if request.query.get("alt") == ["media"]:
        response["x-goog-generation"] = generation
      handle(request, response, storage)

    return handled

  for name in ("gcp_storage_emulator", "api.object"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  patch = pytest.MonkeyPatch()
  patch.setattr(server, "HANDLERS", [
      (path, {m: conditional(handle) if "bucket_name" in path else handle
              for m, handle in handlers.items()})
      for path, handlers in server.HANDLERS
  ])
  for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    patch.setenv(name, f"http://127.0.0.1:{port}")
  patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
  patch.setenv("NO_GCE_CHECK", "true")
  with server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
    yield as_path("gs://bucket")
  patch.undo()


@pytest.fixture(scope="module", autouse=True)
def forget_users_files(tmp_path_factory):
  """Files of a user are imported by their name; those of other tests may have the same."""
  yield
  made = str(tmp_path_factory.getbasetemp())
  for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", None)).startswith(made):
      del sys.modules[name]
  sys.path[:] = [place for place in sys.path if not place.startswith(made)]


@pytest.fixture
def make_model():
  """make_model(seed, **fields of ModelConfig) -> (Transformer, {"params": ...}), one tiny decoder.

  The parameters are numpy arrays, larger than at initialisation, so that attention is far
  from uniform and logits differ by nats. Drawing them compiles nothing.
  """
  import flax.linen as nn

  from dpr_jax.models import ModelConfig, Transformer, init_variables

  def make(seed: int, **fields):
    defaults = dict(
        vocab_size=29, hidden_size=16, mlp_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, max_length=64,
    )
    cfg = ModelConfig(**{**defaults, **fields})
    shapes = nn.unbox(jax.eval_shape(lambda k: init_variables(cfg, k), jax.random.key(0)))
    noise = np.random.default_rng(seed)

    def draw(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      mean, std = 0.0, 0.2
      if name.endswith("table"):
        std = 0.4
      elif name.endswith("kernel"):
        std = 2.0 / np.sqrt(np.prod(x.shape[1:-1]) if name.endswith("out/kernel") else x.shape[1])
      elif name.endswith("scale") and not cfg.norm_unit_offset:
        mean = 1.0
      return (mean + std * noise.normal(size=x.shape)).astype(np.float32)

    return Transformer(cfg), jax.tree_util.tree_map_with_path(draw, shapes)

  return make


@pytest.fixture
def budget_of():
  """budget_of(columns, rows, vocab_size) -> the `logits_budget`, GiB, of chunks of `columns`."""
  return lambda columns, rows, vocab_size: 3 * 4 * columns * rows * vocab_size / 2**30


@pytest.fixture
def neighbours(rng):
  """neighbours(variables): each float32 moved to the one above or below it, by chance.

  What a function makes of them tells how much of a difference float32 rounding alone explains,
  where it is too ill-conditioned for a tolerance that stands in a test.
  """

  def move(x):
    return np.nextafter(x, rng.choice([-np.inf, np.inf], size=x.shape).astype(np.float32))

  import jax

  return lambda variables: jax.tree.map(move, variables)


@pytest.fixture(scope="module")
def train_sft(tmp_path_factory):
  """train_sft(change) -> Run on one device, under its mesh; `change(config)` is made first.

  With steps=False nothing is trained.
  """
  import contextlib

  from dpr_jax import sharding
  from dpr_jax.config import debug_config, default_config, resolve
  from dpr_jax.methods.sft import sft_stage
  from dpr_jax.run import set_up
  from dpr_jax.workdir import Workdir

  with contextlib.ExitStack() as meshes:

    def train(change, steps=True):
      config = debug_config(default_config())
      config.model.remat = "none"
      config.sft.steps, config.sft.optimizer.learning_rate = 10, 0.02
      config.budget.max_new_tokens = config.eval.max_new_tokens = 6
      config.data.tasks = ("add", "sort")
      config.eval.frontier_samples = 0
      config.log.progress = config.log.tensorboard = False
      change(config)
      mesh = sharding.make_mesh(devices=jax.devices()[:1])
      meshes.enter_context(jax.set_mesh(mesh))
      run = set_up(resolve(config), Workdir(tmp_path_factory.mktemp("run") / "w"), mesh)
      if steps:
        sft_stage(run)
      return run

    yield train


@pytest.fixture(scope="session")
def with_config():
  """with_config(run, **fields of its config, or methods by name) -> the same run otherwise."""
  import dataclasses

  def change(run, **fields):
    config = run.config
    methods = {n: fields.pop(n) for n in list(fields) if not hasattr(config, n)}
    config = dataclasses.replace(config, methods={**config.methods, **methods}, **fields)
    return dataclasses.replace(run, config=config, _held={})

  return change


@pytest.fixture
def chat_endpoint():
  """chat_endpoint(reply) -> an OpenAI-compatible endpoint on loopback, in a thread.

  `reply(body, number)` -> the text of the answer to the request of that number; or (status, body of
  the answer, headers). `asked` are the bodies in the order of arrival, `headers` those of requests.
  """
  import contextlib
  import http.server
  import json
  import threading
  import types

  with contextlib.ExitStack() as servers:

    def serve(reply):
      seen = types.SimpleNamespace(asked=[], headers=[], lock=threading.Lock())

      class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
          pass

        def _send(self, status, body, headers=()):
          data = body if isinstance(body, bytes) else json.dumps(body).encode()
          with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **dict(headers)}.items():
              self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
          seen.headers.append(dict(self.headers))
          self._send(*(seen.models or (200, {"data": []})))

        def do_POST(self):
          body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
          with seen.lock:
            number = len(seen.asked)
            seen.asked.append(body)
            seen.headers.append(dict(self.headers))
          answer = reply(body, number)
          if isinstance(answer, str):
            answer = 200, {"choices": [{"message": {"role": "assistant", "content": answer}}],
                           "usage": {"prompt_tokens": 100, "completion_tokens": 7}}
          self._send(*answer)

      server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
      threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
      servers.callback(server.server_close)
      servers.callback(server.shutdown)
      seen.models, seen.url = None, f"http://127.0.0.1:{server.server_port}/v1"
      return seen

    yield serve
