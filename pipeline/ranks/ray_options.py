"""Options of the commands of stage two that can run on a Ray cluster."""

from collections.abc import Callable

import click

from distilcache.data.errors import require

ray_address_option = click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Running Ray cluster: auto, HOST:PORT.  [default: the recipe's engine.ray_address, "
    "else RAY_ADDRESS, else one that is started on this machine]",
)


def ray_options(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command of stage two ``--engine``, described by ``help``, and ``--ray-address``."""
    engine = click.option(
        "--engine",
        type=click.Choice(("local", "ray")),
        default="local",
        show_default=True,
        help=help,
    )
    return lambda command: engine(ray_address_option(command))


def ranks_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--engine``, ``--ray-address``, ``--nproc`` and ``--max-restarts``."""
    for option in (
        click.option(
            "--max-restarts",
            default=3,
            type=click.IntRange(min=0),
            metavar="N",
            show_default=True,
            help="How often all processes start again from the newest checkpoint after one is "
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
        ray_options("Where these processes are: on this machine, or on a Ray cluster (Ray Train)."),
    ):
        command = option(command)
    return command


def check_address(engine: str, address: str | None) -> None:
    """Refuse ``--ray-address`` without ``--engine ray``."""
    require(
        not address or engine == "ray",
        f"engine: --ray-address must come with --engine ray, got {address!r} without it",
    )
