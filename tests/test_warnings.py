"""The filters of pyproject.toml do make errors of the warnings that dpr_jax causes."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["dpr_jax", "dpr_jax.models.transformer"])
def test_warnings_from_this_package_are_errors(category, module):
  with pytest.raises(category):
    warnings.warn_explicit("old", category, "file.py", 1, module=module)


def test_warnings_of_others_are_not(recwarn):
  warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="elsewhere.dpr_jax")
  assert len(recwarn) == 1


def test_a_fraction_written_into_integers_is_an_error():
  with pytest.raises(FutureWarning, match="scatter"):
    jnp.zeros(3, jnp.int32).at[0].set(0.7)


def test_implicit_rank_promotion_is_an_error():
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.asarray(np.ones(3))
