"""Keys of a seed: the same under every default implementation, and one for every seed."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpr_jax import keys
from dpr_jax.config import default_config, resolve
from dpr_jax.errors import UserError

words = lambda key: np.asarray(jax.random.key_data(key)).tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_are_those_of_jax(seed):
  assert words(keys.make_key(seed)) == words(jax.random.key(seed, impl="threefry2x32"))


def test_larger_seeds_have_keys_of_their_own():
  seeds = [7, 2**32 + 7, 2**33 + 7, 7 * 2**32, keys.MAX_SEED, keys.MAX_SEED - 2**32]
  assert len({tuple(words(keys.root_key(seed, "init"))) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("fields", [{"seed": keys.MAX_SEED + 1}, {"seed": -1},
                                    {"seed": keys.MAX_SEED, "seeds": 2}])
def test_a_seed_beyond_the_last_is_refused(fields):
  config = default_config()
  config.update(fields)
  with pytest.raises(UserError, match="config.seed="):
    resolve(config)
  with pytest.raises(ValueError, match="seed="):
    keys.make_key(fields["seed"] + fields.get("seeds", 1) - 1)


def test_rows_have_noise_of_their_own_whatever_the_default_implementation_is():
  """vmap over rbg keys uses the first of them; a caller's own rbg key must not spread that."""
  text = """
import jax, numpy as np
from dpr_jax import keys
def noise(rng):
  return np.asarray(jax.vmap(jax.random.uniform)(keys.row_keys(rng, 64))).tolist()
print(noise(keys.root_key(3, "rollouts")))
print(noise(jax.random.key(3)))
"""
  found = {}
  for name in ("rbg", "unsafe_rbg", "threefry2x32"):
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True,
                         env={**os.environ, "JAX_DEFAULT_PRNG_IMPL": name})
    found[name] = out.stdout.splitlines()
  assert found["rbg"][0] == found["unsafe_rbg"][0] == found["threefry2x32"][0]
  for lines in found.values():
    for line in lines:
      assert len(set(line.strip("[]").split(", "))) == 64


def test_keys_are_made_in_one_place():
  package = pathlib.Path(keys.__file__).parent
  for path in package.rglob("*.py"):
    if path.name != "keys.py":
      assert not re.search(r"random\.(key|PRNGKey)\(", path.read_text(encoding="utf-8")), path
