"""Where compiled programs are kept, so that the next process finds them."""

from dpr_jax.errors import UserError
from dpr_jax.paths import Path, absolute, in_bucket

FLAG = "--compilation_cache"
HELP = "folder of compiled programs, which runs may share; default: JAX_COMPILATION_CACHE_DIR, else"


def check_folder(path: str) -> None:
  """Raises UserError where a folder cannot be at `path`."""
  place = absolute(path)
  while not in_bucket(place) and not place.exists():
    place = place.parent
  if not in_bucket(place) and not place.is_dir():
    raise UserError(f"{FLAG}={path}: {place} is a file; name a folder, which is made if need be")


def keep_compilations(path: str | None, default: Path | None = None) -> None:
  """Compiled programs go to `path`, else to the folder JAX is configured with, else to `default`.

  Raises:
    UserError: `path` cannot be a folder.
  """
  import jax

  if path:
    check_folder(path)
  elif jax.config.jax_compilation_cache_dir is None:
    path = None if default is None else str(default)
  if path:
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
