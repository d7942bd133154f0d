"""How much work of this process can go on at once."""

import os


def cores() -> int:
    """Cores that this process may use: a scheduler such as Slurm gives it some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
