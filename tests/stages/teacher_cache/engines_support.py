"""Projects whose workers are watched: what the tests of all engines share."""

import pytest

from distilcache.data.cache.cache import Cache
from tests.command_line import make_project, watch, watched, work
from tests.damage import check
from tests.forked import fork

SETTINGS = {
    "rounds": 2,
    "blocks_per_shard": 1,
    "positions": "all",
    "hidden_layers": (0, 1, -1),
}
PATCH = """
def patch(module):
    write = module.write_shard
    together = int(os.environ.get("WORK_TOGETHER", 1))

    def write_shard(tar, round_index, shard, blocks, identity):
        with open(os.environ["WORK_LOG"], "a") as log:
            log.write(f"{os.getpid()} {round_index} {shard}\\n")
        while len({line.split()[0] for line in open(os.environ["WORK_LOG"])}) < together:
            time.sleep(0.01)
        time.sleep(float(os.environ["WORK_SECONDS"]))
        held = os.environ.get("WORK_HELD") == f"{round_index} {shard}"
        while held and not os.path.exists(os.environ["WORK_LOG"] + ".go"):
            time.sleep(0.01)
        if os.environ.get("WORK_POISON") == f"{round_index} {shard}":
            raise ValueError("this shard is poison")
        return write(tar, round_index, shard, blocks, identity)

    module.write_shard = write_shard
"""


@pytest.fixture(scope="module")
def uninterrupted(small_cache):
    """Made in this process."""
    return small_cache(**SETTINGS)


@pytest.fixture
def project(small_corpus, small_teacher, tmp_path):
    """A recipe whose corpus is made already, and a log of the work: (pid, round, shard)."""
    watch(tmp_path, "distilcache.stages.teacher_cache.pipeline", PATCH)
    return make_project(tmp_path, small_corpus(), small_teacher, cache=SETTINGS)


def command(project, *arguments, seconds=0.0, begin=fork, **more):
    """Stage one; ``begin=start``: in processes that import everything themselves."""
    return begin(project, "teacher-cache", *arguments, env=watched(project, seconds, **more))


def markers(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("shards/*/*.json")}


def check_whole(out, uninterrupted, tree):
    assert tree(out) == tree(uninterrupted)
    assert check(out) == []
    assert not list(out.rglob(".*"))


def total(cache):
    return Cache.open(cache).manifest.totals["shards"]


def check_the_rest_is_made(project, uninterrupted, tree, again):
    """The process that ``again()`` starts makes what is missing, and nothing twice."""
    out = project.parent / "p" / "cache"
    before, begun = markers(out), len(work(project))
    process = again()
    log = "".join(filter(None, process.communicate(timeout=280)))
    assert process.returncode == 0, log
    assert f"{len(before)} of {total(uninterrupted)} shards were there already" in log
    assert before.items() <= markers(out).items()
    assert len(work(project)) - begun == total(uninterrupted) - len(before)
    check_whole(out, uninterrupted, tree)
