"""Options of the commands of stage two that may run on a Ray cluster."""

from collections.abc import Callable

import click

from distilcache.data.errors import require


def ray_options(default: str, help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command of stage two ``--engine`` and ``--ray-address``.

    Args:
        default: What it does without Ray.
        help: Of the engines.
    """
    engine = click.option(
        "--engine", type=click.Choice((default, "ray")), default=default, show_default=True,
        help=help,
    )  # fmt: skip
    address = click.option(
        "--ray-address",
        default="",
        metavar="ADDRESS",
        help="Running Ray cluster: auto, HOST:PORT.  [default: the recipe's engine.ray_address, "
        "else RAY_ADDRESS, else one that is started on this machine]",
    )
    return lambda command: engine(address(command))


def ranks_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--engine``, ``--ray-address``, ``--nproc`` and ``--max-restarts``."""
    for option in (
        click.option(
            "--max-restarts",
            default=3,
            type=click.IntRange(min=0),
            metavar="N",
            show_default=True,
            help="Times that all processes start again from the newest checkpoint where one is "
            "lost.",
        ),
        click.option(
            "--nproc",
            "--workers",
            default=1,
            type=click.IntRange(min=1),
            metavar="N",
            show_default=True,
            help="Processes that train each student together, one per GPU.",
        ),
        ray_options(
            "local", "Where these processes are: on this machine, or on a Ray cluster (Ray Train)."
        ),
    ):
        command = option(command)
    return command


def check_address(engine: str, address: str) -> None:
    """Refuse an address that nobody would call.

    Raises:
        UserError: It comes without ``--engine ray``.
    """
    require(
        not address or engine == "ray",
        f"engine: --ray-address must come with --engine ray, got {address!r} without it",
    )
