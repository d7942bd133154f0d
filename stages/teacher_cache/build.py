"""What stage one is asked for."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.teacher_cache.config import CacheConfig, check_ensemble


def git_revision() -> str | None:
    """Revision of the project's own checkout, None where it is installed without one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What is asked for: small, and sent to every worker.

    Raises:
        UserError: An average of teachers is asked for what it cannot give.
    """

    corpus_dir: Path
    """A finished corpus."""
    out: Path
    """Folder of the cache; an interrupted one is continued, a finished one reused."""
    teacher: str | None
    """Path or hub id; None for a mask-only cache."""
    teacher_revision: str = ""
    """Branch, tag or commit of the teacher on the hub; "": the newest."""
    ensemble: tuple[str, ...] = ()
    """Further teachers that are averaged with it, see :class:`Ensemble`."""
    masking: MaskingConfig
    """Which tokens are masked."""
    config: CacheConfig
    """What is stored."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    dtype: str = "auto"
    """``auto``, ``bfloat16``, ``float32``."""
    needs: str = ""
    """What the recipe says must be at hand, for errors."""
    revision: str | None = field(default_factory=git_revision)
    """Of the project's checkout, which workers need not have."""
    checkpoints: tuple[tuple[str, str], ...] = field(init=False)
    """All teachers, by names that hold in any working folder, and their revisions on the hub."""

    def __post_init__(self) -> None:
        """Make paths absolute; drop fields of a teacher where there is none."""
        ensemble = self.ensemble if self.teacher else ()
        if ensemble:
            check_ensemble(self.config)
        named = [(self.teacher, self.teacher_revision), *((name, "") for name in ensemble)]
        absolute = ((str(Path(n).absolute()) if Path(n).is_dir() else n, r) for n, r in named if n)
        for name, value in {
            "corpus_dir": self.corpus_dir.absolute(),
            "out": self.out.absolute(),
            "teacher_revision": self.teacher_revision if self.teacher else "",
            "ensemble": ensemble,
            "checkpoints": tuple(absolute),
        }.items():
            object.__setattr__(self, name, value)
