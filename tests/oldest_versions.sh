#!/usr/bin/env bash
# Run the tests with the oldest versions that pyproject.toml allows, in a temporary environment.
#
#   tests/oldest_versions.sh [OPTION OF PYTEST ...]
#
# PYTHON chooses the interpreter (python3). The download takes gigabytes: an old torch from the
# index brings its CUDA libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" - > "$work/constraints.txt" <<'PYTHON'
import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
bounds = {bound for group in (project["dependencies"], *extras) for bound in group}
# Constraints take no extras: ray[train]>=2.60 becomes ray==2.60.
print("\n".join(sorted(re.sub(r"\[.*\]", "", bound).replace(">=", "==") for bound in bounds)))
PYTHON
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q -c "$work/constraints.txt" -e '.[dev]'
"$work/venv/bin/python" -m pip freeze --exclude-editable
"$work/venv/bin/python" -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"
