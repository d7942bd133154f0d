"""A Ray cluster of several nodes on this machine, for tests; and what is watched in them."""

from contextlib import contextmanager


@contextmanager
def ray_cluster(monkeypatch, environment):
    """A head of one CPU; processes that it starts have the environment.

    Addresses are loopback ones that Ray leaves as they are. What is started here is ended by its
    own processes' numbers.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "node_ip_address": "127.0.0.2",
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    try:
        yield made
    finally:
        made.shutdown()


def add_node(cluster, number):
    """One more node of one CPU, at 127.0.0.<number>."""
    return cluster.add_node(
        num_cpus=1, node_ip_address=f"127.0.0.{number}", object_store_memory=100 << 20
    )
