"""What is said at the end of a program that had worker processes."""

import subprocess
import sys

from tests.command_line import environment

CODE = """
from distilcache.stages.workers.processes import Worker

def with_a_bar():
    from tqdm.auto import tqdm
    return sum(tqdm(range(4), disable=False, file=open("/dev/null", "w")))

if __name__ == "__main__":
    worker = Worker({})
    worker.call(with_a_bar)
    print(worker.answer())
    worker.close()
"""


def test_bars_of_libraries_leak_nothing(tmp_path):
    (tmp_path / "program.py").write_text(CODE)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("6\n", "")
