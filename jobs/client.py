"""What is asked of a cluster's job server: `omniloom jobs`, `status ID`, `logs ID [-f]`, `stop ID`."""

import json
import sys
import time
from functools import partial

from omniloom.compose import run_job
from omniloom.settings import ClientSettings


def main(settings: ClientSettings) -> None:
    settings.check()
    from omniloom.cluster.submit import Job, JobClient

    client = JobClient(settings.cluster)
    identity = settings.id or ""

    def jobs() -> None:
        listed = client.jobs()
        if settings.json:
            print(json.dumps({"address": client.address, "jobs": [job.as_dict() for job in listed]}))
            return
        print(f"{'id':36} {'status':10} {'submitted':19} {'seconds':>9}")
        for job in listed:
            print(line_of(job))
        if not listed:
            print(f"no job on {client.address}: omniloom submit VERB …")

    def line_of(job: Job) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.submitted))
        return f"{job.id:36} {job.status:10} {began:19} {job.seconds:9,.0f}"

    def status() -> None:
        job = client.job(identity)
        if settings.json:
            print(json.dumps(job.as_dict()))
            return
        facts = {"status": job.status, "message": job.reason, "seconds": f"{job.seconds:,.0f}", **job.metadata}
        print(job.id)
        for name, value in facts.items():
            print(f"  {name:16} {value}")

    def logs() -> None:
        job = client.job(identity)  # a wrong id is named
        if settings.follow:
            stream = sys.stderr if settings.json else sys.stdout
            job = client.follow(identity, partial(print, end="", flush=True, file=stream))
        if settings.json:
            print(json.dumps(job.as_dict() | {"logs": client.logs(identity)}))
        elif not settings.follow:
            print(client.logs(identity), end="")
        if settings.follow:
            job.say_how_it_ended()

    def stop() -> None:
        job = client.job(identity)
        asked = client.stop(identity)
        if settings.follow and asked:
            job = client.follow(identity, partial(print, end="", flush=True, file=sys.stderr))
        if settings.json:
            print(json.dumps({"id": identity, "asked": asked, "status": client.job(identity).status}))
        elif asked:
            print(f"{identity} is asked to stop: it saves a checkpoint first")
        else:
            print(f"{identity} had ended already: {job.status}")

    {"jobs": jobs, "status": status, "logs": logs, "stop": stop}[settings.verb]()


if __name__ == "__main__":
    run_job("client", ClientSettings, main)
