"""What ``distilcache publish`` does."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.publish import publish_cache, total_bytes
from distilcache.data.errors import require
from distilcache.data.storage.remote import Remote, is_url


def publish_command(folder: Path, url: str) -> tuple[dict[str, Any], str]:
    """Copy a cache with a bar; returns values for JSON and the text for people."""
    require(
        is_url(url),
        f"publish: URL must name a place that fsspec can open (s3://bucket/folder), got {url!r}; a "
        "local cache is copied with cp -r",
    )
    Cache.open(folder)
    place = Remote(url)
    with tqdm(total=total_bytes(folder), unit="B", unit_scale=True, desc="publish") as bar:
        publish_cache(folder, place, bar.update)
        size = bar.n
    return (
        {"path": str(folder), "url": url, "bytes": size},
        f"publish: {folder} is complete at {url} ({size:,} bytes); train from it with "
        f"--set cache_from={url}",
    )
