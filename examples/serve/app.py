"""Handwritten digits by HTTP, from replicas of one cached model: Ray Serve routes, scales and looks after them.

    python examples/serve/app.py                         (pip install "cachepass[serve]")
    curl "http://127.0.0.1:8000/image?label=7&seed=1" -o seven.png
    curl -N "http://127.0.0.1:8000/stream?label=7&seed=1"      a line for each step, then the picture

In each replica an engine (engine.py) steps all of its requests together; a request joins between two steps and leaves
when it is over. Replicas come and go with the number of requests in progress. What a replica loses, if it is killed, is
the state of its requests: a client that asks again, with the same seed, gets the same picture (load.py does).
"""

import os
import secrets
import signal
import threading

if __name__ == "__main__":  # A Ray of its own; Ray reads these when it is imported.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its processes talk by the loopback address, as they do on a Mac
        "RAY_AUTH_MODE": "token",  # and only to those that know the token
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }

import click
import ray
from ray import serve
from replica import Digits

HOST = "127.0.0.1"

app = Digits.bind()  # for ``PYTHONPATH=examples/serve serve run app:app``, on a cluster that is there


@click.command()
@click.option("--port", default=8000, show_default=True)
@click.option("--replicas", default=None, type=click.IntRange(1), help="A fixed number, instead of 1 to 2 as needed.")
@click.option("--lowering", default="specialize", show_default=True, help='"eager" compiles no kernels.')
def main(port: int, replicas: int | None, lowering: str) -> None:
    """Serve on this machine's loopback address, until interrupted."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ray.init(num_cpus=max(replicas or 0, 2), include_dashboard=False, object_store_memory=80 * 2**20)
    try:
        serve.start(http_options={"host": HOST, "port": port})
        fixed = {} if replicas is None else {"num_replicas": replicas, "autoscaling_config": None}
        serve.run(Digits.options(**fixed).bind(lowering))
        print(f"serving on http://{HOST}:{port}/image?label=7&seed=1", flush=True)
        stop.wait()
    finally:
        ray.shutdown()  # ends all of its processes


if __name__ == "__main__":
    main()
