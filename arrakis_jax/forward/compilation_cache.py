"""Compiled programs kept on disk, so that the next process need not compile them again."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from arrakis_jax.core.errors import expected

# Most of a first call's time is compilation. Quicker programs are not worth a file.
SECONDS = 0.1


def compilation_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs in a folder, for this process and for all later ones.

    A script's first calls then take a fifth to an eighth of the time, if the same programs ran
    before. The command line does this by itself. It sets JAX's own cache, which all of JAX uses.

    Args:
        folder: where to keep them; made if it is not there. None for the folder that JAX has been
            given already, else `arrakis_jax` in the user's cache folder.

    Returns:
        The folder. Delete it to free the space.

    Raises:
        ValueError: for a folder that is a file.

    Example:
        >>> compilation_cache().is_dir()
        True
    """
    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None and kept is not None:
        return Path(kept)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = caches / "arrakis_jax" if folder is None else Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(expected("folder", "a folder", repr(str(place)), "name another"))
    place.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    # JAX decides at its first compilation whether there is a cache. This lets it decide again.
    reset_cache()
    return place
