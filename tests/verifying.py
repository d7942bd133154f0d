"""What the check of a cache finds."""

from distilcache.data.verify.run import Settings, verify_cache


def fault_lines(path) -> list[str]:
    """One line per fault of the cache in a folder."""
    return [fault.text for fault in verify_cache(path, Settings(workers=1))]
