"""A Ray cluster: joining one that runs, or starting one on this machine.

Nodes run the driver's code, whatever they have installed of it, and paths mean to a worker what
they mean to the driver.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, one_line, require, to_install

PACKAGE = Path(__file__).parents[2]
"""The folder of ``distilcache``, as it was imported: Ray takes that name for the package."""
REACH_SECONDS = 20.0
"""Within which the head of a cluster must answer."""


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """Be a driver on a cluster.

    Args:
        address: Of a running cluster; "": RAY_ADDRESS, or one is started on this machine that
            ends with the block.

    Yields:
        The module ``ray``.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise missing() from None
    own = not ray.is_initialized()
    # On stdout, which is for results, Ray says what workers print and what becomes of them; some
    # of it only as it ends.
    with contextlib.redirect_stdout(sys.stderr):
        if own:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            _connect(ray, address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would abort the driver.
        try:
            yield ray
        finally:
            if own:
                ray.shutdown()


def missing() -> UserError:
    """The error where Ray, or a package that it needs, is not installed."""
    return UserError(f"engine: name must be one that is installed, got 'ray'; {to_install('ray')}")


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without an address Ray would join whatever cluster another program has started here.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _reach(address)
        ray.init(address=address, runtime_env={"py_modules": [str(PACKAGE)]}, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"engine: ray_address must be that of a running Ray cluster, got {address!r}: "
            f"{one_line(error)}; start one with `ray start --head`, or leave out --ray-address and "
            "RAY_ADDRESS for one on this machine"
        ) from None


def _reach(address: str) -> None:
    """Ask once whether anybody listens; Ray itself would ask for many minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


def unit_of(ray: Any, device: str) -> str:
    """What a worker takes one of: ``GPU`` or ``CPU``; ``auto``: GPUs where the cluster has some.

    Raises:
        UserError: It is one GPU of many, which only Ray can choose.
    """
    require(
        not device.startswith("cuda:"),
        f"recipe: device must name no number where Ray hands out GPUs, got {device!r}; use "
        "--set device=cuda",
    )
    gpus = ray.cluster_resources().get("GPU", 0) if device == "auto" else 0
    return "GPU" if gpus or device == "cuda" else "CPU"


def cores_each(ray: Any, device: str, workers: int) -> int:
    """Cores of each of ``workers`` tasks: on CPUs they share the cluster, else one will do.

    A task must fit the smallest node that takes any. Without a number of workers each takes one
    core, so that as many run as there are.
    """
    if not workers or unit_of(ray, device) != "CPU":
        return 1
    nodes = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    nodes = [cores for cores in nodes if cores]
    return max(1, min([*nodes, sum(nodes) // workers])) if nodes else 1


def call_in(folder: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` where relative paths are those of the driver, in ``folder``.

    Nodes without that folder take relative paths as they may: projects on several machines have
    absolute ones.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    return function(*args)
