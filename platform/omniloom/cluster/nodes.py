"""The process that holds a local cluster's nodes: `python -m omniloom.cluster.nodes '{"nodes": 2, …}'`.

Ray's own command line binds worker nodes to every interface; its cluster of one machine, made here, to loopback.
"""

import json
import signal
import sys
import threading
from pathlib import Path

from ray._private.utils import get_ray_address_file, write_ray_address
from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 512 << 20
WATCH_S = 1.0


def hold(nodes: int, cpus: int, gpus: int, port: int, dashboard_port: int, agent_port: int, scratch: str) -> None:
    """Start the nodes; end them on SIGTERM, or when the head has lost a process it cannot do without.

    SIGUSR1 adds a node, such as one in the place of a node that died.
    """
    stop, more = threading.Event(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: more.set())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    temp_dir = f"{scratch}/ray"
    shared = {"node_ip_address": "127.0.0.1", "temp_dir": temp_dir, "num_cpus": cpus, "num_gpus": gpus}
    shared |= {"object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(shutdown_at_exit=True)
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    # Without a port for its agent the head takes no jobs.
    head = cluster.add_node(gcs_server_port=port, dashboard_agent_listen_port=agent_port, **dashboard, **shared)
    # Jobs look for their cluster beside its files; what Ray wrote for everybody on this machine goes.
    write_ray_address(head.gcs_address, temp_dir)
    Path(get_ray_address_file(None)).unlink(missing_ok=True)
    for _ in range(nodes - 1):
        if stop.is_set():
            break
        cluster.add_node(**shared)
    while not stop.wait(WATCH_S):
        if more.is_set():
            more.clear()
            cluster.add_node(**shared)
        dead = {name for name, _ in head.dead_processes()}
        if dead & {"gcs_server", "raylet", "dashboard"}:
            print(f"the head has lost {', '.join(sorted(dead))}", flush=True)
            break
    cluster.shutdown()


if __name__ == "__main__":
    hold(**json.loads(sys.argv[1]))
