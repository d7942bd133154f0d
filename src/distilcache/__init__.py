"""Read a teacher cache and train students from it in a notebook or a script.

    from distilcache import CachedDistillationTrainer, build_student, open_cache

Making caches is what the command of the same name does. Nothing heavy is loaded before it is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcache.data.errors import UserError

if TYPE_CHECKING:
    from distilcache.data.reading import OpenCache
    from distilcache.stages.student_train.notebook import CachedDistillationTrainer, build_student

__all__ = ["CachedDistillationTrainer", "UserError", "build_student", "open_cache"]


def open_cache(path: Path | str) -> "OpenCache":
    """Open a finished teacher cache.

    Args:
        path: Its folder, or its URL (``s3://``, ``https://`` ...): then blocks are read as they
            are needed.

    Raises:
        UserError: There is none, it is incomplete, or it is damaged.
    """
    from distilcache.data.cache.cache import Cache
    from distilcache.data.reading import OpenCache

    return OpenCache(Cache.open(path))


def __getattr__(name: str) -> Any:
    """What needs torch and transformers, when it is first asked for."""
    if name in ("CachedDistillationTrainer", "build_student"):
        from distilcache.stages.student_train import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
