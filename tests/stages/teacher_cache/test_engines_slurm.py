"""The files of deploy/slurm on a real Slurm: a controller and two nodes on this machine.

Needs the programs of slurmctld, slurmd, slurm-client and munge, installed or unpacked into a folder
that SLURM_PREFIX names, and root (Slurm's controller starts jobs as their user).
"""
# ruff: noqa: F811

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.command_line import ROOT, wait_until, watched, work
from tests.stages.teacher_cache.engines_support import (
    check_whole,
    markers,
    project,  # noqa: F401
    total,
    uninterrupted,  # noqa: F401
)

PREFIX = Path(os.environ.get("SLURM_PREFIX", "/"))
LIBRARIES = PREFIX / "usr/lib/x86_64-linux-gnu"
PROGRAMS = {
    name: next((p for p in (PREFIX / "usr/sbin" / f"{name}-wlm", PREFIX / "usr/sbin" / name)
                if p.exists()), None)
    for name in ("munged", "slurmctld", "slurmd", "slurmstepd")
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in PROGRAMS.values(), reason="needs Slurm (see SLURM_PREFIX)"),
    pytest.mark.skipif(os.getuid() != 0, reason="Slurm's controller needs root"),
]
CONFIG = """
ClusterName=t
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
PluginDir={plugins}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/d.%n.pid
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/d.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=16 CoresPerSocket=16
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=16 CoresPerSocket=16
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory):
    """Environment in which sbatch and squeue speak to a cluster that lives as long as the test."""
    root = tmp_path_factory.mktemp("slurm")
    for name in ("m", "state", "spool"):
        (root / name).mkdir(mode=0o700)
    (root / "m" / "key").write_bytes(os.urandom(128))
    (root / "m" / "key").chmod(0o400)
    # An installed Slurm finds its libraries; a Python with its own must not find the system's.
    libraries = {"LD_LIBRARY_PATH": f"{LIBRARIES}:{LIBRARIES / 'slurm-wlm'}"}
    variables = {
        **os.environ,
        **(libraries if Path("/") != PREFIX else {}),
        "PATH": f"{PREFIX / 'usr/bin'}:{os.environ['PATH']}",
        "SLURM_CONF": str(root / "slurm.conf"),
    }
    # Below the ports that connections are given: they are not taken by chance.
    port = 20000 + os.getpid() % 4000 * 3
    plugins = LIBRARIES / "slurm-wlm"
    text = CONFIG.format(root=root, plugins=plugins, port=port, n1=port + 1, n2=port + 2)
    (root / "slurm.conf").write_text(text)
    key = ["--force", "-S", root / "munge.sock", f"--key-file={root / 'm' / 'key'}",
           f"--pid-file={root / 'm' / 'pid'}", f"--seed-file={root / 'm' / 'seed'}",
           f"--log-file={root / 'm' / 'log'}"]  # fmt: skip
    step = PROGRAMS["slurmstepd"]
    with ExitStack() as running:
        for arguments in (
            [PROGRAMS["munged"], "--foreground", *key],
            [PROGRAMS["slurmctld"], "-D", "-c"],
            *([PROGRAMS["slurmd"], "-D", "-N", node, "-d", step] for node in ("n1", "n2")),
        ):
            log = running.enter_context((root / "output").open("ab"))
            process = subprocess.Popen(list(map(str, arguments)), env=variables, stderr=log)
            running.callback(process.wait)
            running.callback(process.terminate)
            time.sleep(1)
        states = lambda: subprocess.run(  # noqa: E731
            ["sinfo", "-h", "-o", "%T %D"], env=variables, capture_output=True, text=True
        ).stdout.split()
        wait_until(lambda: states() == ["idle", "2"], seconds=60)
        yield variables
        # Jobs outlive the daemons; this cluster has none but the test's own.
        subprocess.run(["scancel", "--state=RUNNING"], env=variables, check=False)
        time.sleep(1)


def test_the_files_of_deploy_bring_a_project_to_its_end(project, uninterrupted, tree, slurm):
    """One array task is killed: the other finishes, the array is submitted again, then students
    are trained."""
    folder, out = project.parent, project.parent / "p" / "cache"
    with project.open("a") as recipe:
        recipe.write('[student]\nsizes = ["1x32"]\ncontrol = false\n[train]\nbatch_size = 16\n')
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    for script in (folder / "deploy" / "slurm").glob("*.sbatch"):  # the nodes have no GPUs
        script.write_text(script.read_text().replace("#SBATCH --gpus=1\n", ""))
    (folder / "bin").mkdir()
    program = folder / "bin" / "distilcache"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m distilcache.pipeline.cli "$@"\n')
    program.chmod(0o755)
    seen = watched(project, 0.3)
    variables = {
        **slurm,
        **{name: seen[name] for name in seen if name.startswith(("WORK_", "PYTHON", "OMP"))},
        "PATH": f"{folder / 'bin'}:{slurm['PATH']}",
        "RECIPE": str(project),
        "WORKERS": "2",
        "ATTEMPTS": "1",
    }

    def jobs():
        done = subprocess.run(
            ["squeue", "-h", "-o", "%j"], env=variables, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    bash = shutil.which("bash")
    subprocess.run([bash, "deploy/slurm/submit.sh"], cwd=folder, env=variables, check=True)
    phases = ("corpus", "teacher-cache", "student-train", "evaluate", "again")
    assert set(jobs()) == {f"distilcache-{phase}" for phase in phases}
    wait_until(lambda: len({pid for pid, *_ in work(project)}) == 2, seconds=180)
    wait_until(lambda: len(markers(out)) >= 3)
    os.kill(work(project)[-1][0], signal.SIGKILL)
    wait_until(lambda: not jobs(), seconds=240)
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    check_whole(out, uninterrupted, tree)
    assert len(work(project)) <= total(uninterrupted) + 1
    assert sum(name.startswith("distilcache-teacher-cache") for name in logs) == 4
    assert sum(name.startswith("distilcache-again") for name in logs) == 1
    (trained,) = [text for name, text in logs.items() if "student-train" in name]
    assert (folder / "p" / "students" / "1x32" / "model.safetensors").exists(), trained
    assert (folder / "p" / "report" / "report.md").exists(), trained
