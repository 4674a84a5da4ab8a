"""A Ray cluster on this machine, to try things out: `omniloom cluster up nodes=2`, `omniloom cluster down`."""

import json
from dataclasses import asdict

from omniloom.compose import run_job
from omniloom.settings import LocalClusterSettings


def main(settings: LocalClusterSettings) -> None:
    settings.check()
    from omniloom.cluster.local import read_local, start_local, stop_local

    if settings.action == "down":
        cluster = read_local()
        ended = stop_local(cluster) if cluster else 0
        if settings.json:
            print(json.dumps({"was_up": cluster is not None, "processes": ended}))
        else:
            print(f"ended {ended} processes of {cluster.address}" if cluster else "no cluster is up")
        return
    cluster = start_local(settings)
    if settings.json:
        print(json.dumps(asdict(cluster)))
        return
    print(f"a cluster of {cluster.nodes} nodes is up; its dashboard: {cluster.dashboard} (asks for the token)")
    print("submit to it: omniloom submit train experiment=smoke run=smoke")
    print("run on it from here: omniloom train … cluster.address=up")
    print("for Ray's own tools:")
    print(f"  export RAY_ADDRESS={cluster.address} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token_path}")
    print("end it: omniloom cluster down")


if __name__ == "__main__":
    run_job("local_cluster", LocalClusterSettings, main)
