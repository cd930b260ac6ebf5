"""What was saved comes back bit for bit, or a clear refusal does."""

import errno
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpr_jax.errors import UserError
from dpr_jax.training import TrainState, make_train_step
from dpr_jax.training import checkpoints as checkpoints_lib
from dpr_jax.training.checkpoints import Checkpoints
from dpr_jax.training.integrity import fingerprint
from dpr_jax.training.steps import abstract_state

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def _bits(tree):
  def leaf(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x).copy()

  return jax.tree.map(leaf, tree)


def _assert_same(a, b):
  for x, y in zip(jax.tree.leaves(_bits(a)), jax.tree.leaves(_bits(b)), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def _abstract(state):
  describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return abstract_state(jax.tree.map(describe, state.trainable), OPTIMIZER, state.rng)


@pytest.fixture
def trained(rng, loss_fn, make_rows, make_state):
  """A state after two updates and the function that goes on training it."""
  step = make_train_step(loss_fn, OPTIMIZER, donate=False)
  state = make_state(OPTIMIZER, seed=3, spare=4096)
  for _ in range(2):
    state, _ = step(state, make_rows(rng))
  return state, lambda s: step(s, make_rows(rng))[0]


def _array_files(directory, step, item):
  """Files that hold array values of one checkpoint, largest first."""
  files = [p for p in pathlib.Path(directory, str(step), item).rglob("*")
           if p.is_file() and p.parent.name == "d"]
  assert files
  return sorted(files, key=lambda p: -p.stat().st_size)


def test_a_checkpoint_gives_back_every_bit(tmp_path, trained):
  state, train = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    later = train(state)  # training goes on while the save runs.
    checkpoints.wait()
    assert int(later.step) == 3
  with Checkpoints(tmp_path) as checkpoints:
    restored, data = checkpoints.restore(_abstract(state), frozen={"params": {"x": jnp.ones(1)}})
  assert data == {"next_step": 2} and int(restored.step) == 2
  assert set(restored.frozen["params"]) == {"x"}
  _assert_same(
      (restored.trainable, restored.opt_state, restored.rng),
      (state.trainable, state.opt_state, state.rng),
  )
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state.opt_state)


def test_donated_buffers_do_not_reach_the_file(tmp_path, rng, loss_fn, make_rows, make_state):
  step, state = make_train_step(loss_fn, OPTIMIZER), make_state(OPTIMIZER)
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    expected = {}
    for t in (1, 2, 3):
      state, _ = step(state, make_rows(rng))
      expected[t] = _bits(state.trainable)
      checkpoints.save(state, t, {})
    checkpoints.wait()
    for t in (1, 2, 3):
      like = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.trainable
      )
      _assert_same(checkpoints.restore_variables(t, like), expected[t])


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_takes_no_more_is_one_line_and_loses_nothing(tmp_path, trained):
  resource = pytest.importorskip("resource")
  state, train = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    with pytest.raises(UserError, match="checkpoint of step 3 cannot be written .*File too large"):
      with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(train(state), 3, {"next_step": 3})
        checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  with Checkpoints(tmp_path) as checkpoints:
    restored, data = checkpoints.restore(_abstract(state))
  assert data == {"next_step": 2}
  _assert_same(restored.trainable, state.trainable)


def test_in_a_bucket_a_save_that_was_cut_off_is_ignored_and_a_damaged_one_renamed(bucket, trained):
  state, train = trained
  folder = bucket / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    for step in (3, 4):
      checkpoints.save(train(state), step, {"next_step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3, 4]
  (folder / "4" / "commit_success.txt").unlink()
  assert (folder / "3" / "files.json").exists()
  file = next(p for p in (folder / "3" / "variables" / "ocdbt.process_0" / "d").iterdir())
  damaged = bytes(x ^ 1 for x in file.read_bytes())
  file.write_bytes(damaged)
  with Checkpoints(folder, keep=3) as checkpoints:
    assert checkpoints.steps() == [2, 3]
    restored, data = checkpoints.restore(_abstract(state))
    assert data == {"next_step": 2} and checkpoints.steps() == [2]
    _assert_same(restored.trainable, state.trainable)
    checkpoints.save(state, 4, {"next_step": 4})  # What was cut off is removed by then.
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    restored, data = checkpoints.restore(_abstract(state))
    assert data == {"next_step": 4}
    _assert_same(restored.trainable, state.trainable)
  assert {p.name for p in folder.iterdir()} == {"2", "3.damaged", "4"}
  assert (folder / "3.damaged" / file.relative_to(folder / "3")).read_bytes() == damaged


def test_an_empty_folder_restores_nothing(tmp_path, trained):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [] and checkpoints.restore(_abstract(trained[0])) is None
    with pytest.raises(UserError, match="no checkpoint of step 4; it holds none"):
      checkpoints.restore_variables(4, trained[0].trainable)


def test_milestones_stay_and_only_the_latest_of_the_others(tmp_path, trained):
  state, _ = trained
  with Checkpoints(tmp_path, keep=1, keep_steps=(2, 5)) as checkpoints:
    for t in range(1, 8):
      checkpoints.save(state, t, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 7]
    checkpoints.save(state, 5, {})  # there already: nothing happens.
    assert checkpoints.steps() == [2, 5, 7]
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps() == [2, 5, 7]


def test_a_save_that_would_be_lost_is_an_error(tmp_path, trained):
  state, _ = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 5, {})
    checkpoints.wait()
    with pytest.raises(RuntimeError, match="step 3 was not saved"):
      checkpoints.save(state, 3, {})


def test_variables_are_read_in_another_dtype(tmp_path, trained):
  state, _ = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 2, {})
    checkpoints.wait()
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), state.trainable
  )
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    got = checkpoints.restore_variables(2, like)
  _assert_same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.trainable))


def test_an_interrupted_save_is_ignored(tmp_path, trained):
  state, _ = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    checkpoints.wait()
  torn = tmp_path / "4.orbax-checkpoint-tmp"
  (torn / "variables.orbax-checkpoint-tmp").mkdir(parents=True)
  (torn / "variables.orbax-checkpoint-tmp" / "half").write_bytes(b"\0" * 10)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2]
    assert checkpoints.restore(_abstract(state))[1] == {"next_step": 2}
    checkpoints.save(state, 4, {"next_step": 4})
    checkpoints.wait()
    assert checkpoints.steps()[-1] == 4


def _flip(files):
  """One bit of one array value: Orbax itself does not notice."""
  data = bytearray(files[0].read_bytes())
  assert len(data) > 4096
  data[len(data) // 2] ^= 1
  files[0].write_bytes(bytes(data))


def _truncate(files):
  files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size // 2])


def _remove(files):
  files[0].unlink()


@pytest.mark.parametrize("item", ["variables", "training"])
@pytest.mark.parametrize("damage", [_flip, _truncate, _remove], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(tmp_path, trained, caplog, item, damage):
  state, train = trained
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    newer = train(state)
    checkpoints.save(newer, 3, {"next_step": 3})
  damage(_array_files(tmp_path, 3, item))
  with Checkpoints(tmp_path, read_only=True) as checkpoints:  # looks, and leaves all as it is.
    assert int(checkpoints.restore(_abstract(state))[0].step) == 2
    assert checkpoints.steps() == [2, 3]
  caplog.clear()
  with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, keep=2) as checkpoints:
    restored, data = checkpoints.restore(_abstract(state))
    assert int(restored.step) == 2 and data == {"next_step": 2}
    _assert_same(restored.trainable, state.trainable)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("dpr_jax")]
    assert "step 3 is damaged" in message and "step 2" in message and str(tmp_path) in message
    assert ("is not what was saved" in message) == (damage is _flip)
    # Nothing is lost, and the step is free again: a resumed run saves it a second time.
    assert (tmp_path / "3.damaged" / "meta" / "metadata").is_file()
    checkpoints.save(newer, 3, {"next_step": 3})
    checkpoints.wait()
    assert int(checkpoints.restore(_abstract(state))[0].step) == 3


def _meta_of_another_step(folder):
  meta = folder / "3" / "meta" / "metadata"
  meta.write_text(meta.read_text().replace('"next_step": 3', '"next_step": 4'))


def _key_of_meta(folder):
  meta = folder / "3" / "meta" / "metadata"
  meta.write_text(meta.read_text().replace("next_step", "nexu_step"))


def _empty_meta(folder):
  (folder / "3" / "meta" / "metadata").write_text("")


def _rename(folder):
  (folder / "3").rename(folder / "4")


@pytest.mark.parametrize(
    "damage", [_meta_of_another_step, _key_of_meta, _empty_meta, _rename], ids=lambda f: f.__name__
)
def test_a_checkpoint_of_another_step_or_position_is_set_aside(tmp_path, trained, damage):
  state, train = trained
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    checkpoints.save(train(state), 3, {"next_step": 3})
  damage(tmp_path)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    restored, data = checkpoints.restore(_abstract(state))
    assert int(restored.step) == 2 and data == {"next_step": 2} and checkpoints.steps() == [2]
  assert len(list(tmp_path.glob("[34].damaged"))) == 1


NOT_DAMAGE = [
    PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EMFILE, "Too many open files"),
    TimeoutError("timed out"), ValueError("UNAVAILABLE: connection reset"),
    ValueError("PERMISSION_DENIED: bucket"), ValueError("DEADLINE_EXCEEDED"),
    RuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError("std::bad_alloc"),
    MemoryError(), AttributeError("no attribute 'restore'"),
]


@pytest.fixture
def flaky(tmp_path, trained, monkeypatch):
  """flaky(error, times) -> Checkpoints of steps 2 and 3; reading 3 fails at first."""
  monkeypatch.setattr(checkpoints_lib, "RETRY_SECONDS", (0.0, 0.0, 0.0))
  state, train = trained
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(state, 2, {"next_step": 2})
    checkpoints.save(train(state), 3, {"next_step": 3})

  def make(error, times):
    checkpoints, left = Checkpoints(tmp_path, keep=2), [times]
    real = checkpoints._read

    def read(step, items):
      if step == 3 and left[0]:
        left[0] -= 1
        raise error
      return real(step, items)

    monkeypatch.setattr(checkpoints, "_read", read)
    return checkpoints

  return make


def test_an_error_that_proves_no_damage_changes_nothing(tmp_path, trained, flaky):
  files = lambda: sorted(str(p) for p in tmp_path.rglob("*"))
  before = files()
  for error in NOT_DAMAGE:
    with flaky(error, times=99) as checkpoints:
      with pytest.raises(UserError, match="step 3 .*nothing was changed") as caught:
        checkpoints.restore(_abstract(trained[0]))
      assert type(error).__name__ in str(caught.value) and "\n" not in str(caught.value)
      with pytest.raises(UserError, match="nothing shows that it is damaged"):
        checkpoints.restore_variables(3, trained[0].trainable)
      assert checkpoints.steps() == [2, 3]
    assert files() == before


def test_an_error_that_passes_is_tried_again(trained, flaky):
  with flaky(OSError(errno.EIO, "Input/output error"), times=3) as checkpoints:
    restored, data = checkpoints.restore(_abstract(trained[0]))
    assert int(restored.step) == 3 and data == {"next_step": 3}


def test_a_path_that_cannot_be_read_back_is_refused(tmp_path, trained):
  """Orbax takes it for a pattern, and merges nothing at the end of a save."""
  for name in ("run [2]", "what?", "a*b", "back\\slash"):
    with pytest.raises(UserError, match="cannot be written to a path with any of"):
      Checkpoints(tmp_path / name)
    assert not (tmp_path / name).exists()
  for name in ("me@lab", "a b", "per%20cent", "{x}", "#1"):
    with Checkpoints(tmp_path / name) as checkpoints:
      checkpoints.save(trained[0], 2, {"next_step": 2})
      checkpoints.wait()
      assert checkpoints.restore(_abstract(trained[0]))[1] == {"next_step": 2}, name


def test_nothing_readable_is_an_error_and_removes_nothing(tmp_path, trained):
  state, _ = trained
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(state, 2, {})
    checkpoints.save(state, 3, {})
  for step in (2, 3):
    _flip(_array_files(tmp_path, step, "variables"))
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    with pytest.raises(UserError, match=r"no checkpoint of steps \[2, 3\] can be read"):
      checkpoints.restore(_abstract(state))
    assert checkpoints.steps() == [2, 3]
    with pytest.raises(UserError, match="step 3 cannot be read"):
      checkpoints.restore_variables(3, state.trainable)


def test_another_model_is_refused_and_its_checkpoints_are_left(tmp_path, trained, make_state):
  state, _ = trained
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 2, {})
    checkpoints.wait()
    wide = {"params": {"kernel": jnp.zeros((4,)), "bias": jnp.zeros(())}}
    other = TrainState.create(wide, OPTIMIZER, jax.random.key(0))
    with pytest.raises(UserError, match="can be read into this model"):
      checkpoints.restore(_abstract(other))
    assert checkpoints.steps() == [2]


def test_fingerprints_see_single_bits_places_and_dtypes(rng):
  tree = {
      "a": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
      "b": jnp.asarray(1 + rng.permutation(7) + rng.random(), jnp.bfloat16),  # all different.
      "c": [jnp.arange(4), jnp.array(True), jax.random.key(1)],
  }
  first = fingerprint(tree)
  assert json.loads(json.dumps(first)) == first and len(first) == 5
  assert fingerprint(jax.tree.map(lambda x: x, tree)) == first
  for path, x in (("a", tree["a"]), ("b", tree["b"])):
    raw = np.array(x).view(np.uint8).reshape(-1)
    for _ in range(20):
      flipped = raw.copy()
      flipped[rng.integers(raw.size)] ^= np.uint8(1 << rng.integers(8))
      damaged = flipped.view(np.asarray(x).dtype).reshape(x.shape)
      assert fingerprint({**tree, path: jnp.asarray(damaged)})[path] != first[path]
    i, j = rng.choice(x.size, 2, replace=False)
    swapped = np.array(x).reshape(-1)
    swapped[[i, j]] = swapped[[j, i]]
    assert fingerprint({**tree, path: jnp.asarray(swapped.reshape(x.shape))})[path] != first[path]
  assert fingerprint({"a": tree["a"].astype(jnp.bfloat16)})["a"] != first["a"]
  assert fingerprint({"c": [tree["c"][0], tree["c"][1], jax.random.key(2)]})["c/2"] != first["c/2"]
