"""Which names of devices and types of numbers there are. No torch here."""

from distilcache.data.errors import require


def check_device_name(name: str) -> None:
    """Refuse what is none of ``auto``, ``cpu``, ``cuda`` and ``cuda:N``."""
    require(
        name in ("auto", "cpu", "cuda") or (name.startswith("cuda:") and name[5:].isdecimal()),
        f"recipe: device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}",
    )


def check_dtype_name(name: str) -> None:
    """Refuse what is none of ``auto``, ``bfloat16`` and ``float32``."""
    require(
        name in ("auto", "bfloat16", "float32"),
        f"recipe: dtype must be 'auto', 'bfloat16' or 'float32', got {name!r}",
    )
