#!/usr/bin/env python3
"""Serve cub on Ray Serve: two replicas on this machine, and requests that begin alike on the same one.

    pip install '.[ray]'
    python examples/serve_ray.py [PORT]      # until Ctrl-C; port 8000 unless given

On a cluster: ray start on every machine, this program on one of them, replicas=4, gpus=1, and the folder of a model.
"""

import sys

from ray import serve

from hyaena.serve.loading import ServerOptions
from hyaena.serve.ray import application

app = application(ServerOptions(model="cub"), replicas=2)

if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if len(sys.argv) > 1 else 8000})
    serve.run(app, blocking=True)
