"""The documents as tests read them: their blocks, commands and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("make", "distilcache", "python", "pip", "torchrun", "sky", "kubectl", "git", "deploy/")


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its command lines, continued ones joined, without remarks; none: it is a figure."""
        if self.language not in ("", "sh", "bash"):
            return []
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        lines = [re.split(r"\s+#|(?<=\S)\s{3,}", line.strip())[0] for line in lines]
        lines = [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]
        return lines if any(is_command(line) for line in lines) else []


def is_command(line: str) -> bool:
    """Whether a line begins with a program, after variables that are set for it."""
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    return bool(words) and any(
        words[0] == p or (p.endswith("/") and words[0].startswith(p)) for p in PROGRAMS
    )


def fences(text: str) -> list[Fence]:
    """Blocks of a page."""
    return [Fence(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]


def prose(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def inline(text: str) -> list[str]:
    """Code within sentences."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def lines_of(page: Path) -> list[str]:
    """Command lines of a page."""
    return [line for fence in fences(page.read_text()) for line in fence.commands]


def anchors(page: Path) -> set[str]:
    """Places within a page that a link may lead to."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def name(path: Path) -> str:
    """Of a page, for the report of a test."""
    return path.name
