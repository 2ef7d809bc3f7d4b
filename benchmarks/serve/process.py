"""``hyaena serve`` as a process of its own on this machine, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

READY = re.compile(r"at http://(?P<host>[\d.]+):(?P<port>\d+)")


@dataclass
class ServerProcess:
    """A server that accepts connections.

    Attributes:
        process: of the server.
        host, port: where it listens.
        log: lines that it has written so far.
    """

    process: subprocess.Popen[str]
    host: str = ""
    port: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def end(self, timeout: float = 200) -> int:
        """Send SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(timeout)

    def resident_bytes(self) -> int:
        """Memory of the process, on Linux."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        """Threads of the process, on Linux."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def open_files(self) -> int:
        """Open files and connections of the process, on Linux."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def serving(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start ``hyaena serve`` with these options on a free port; it is ended afterwards.

    Raises:
        RuntimeError: it ended before it listened.
    """
    command = [sys.executable, "-m", "hyaena", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stderr is not None
    server = ServerProcess(process)
    ready = threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.log.append(line)
            if not server.port and (found := READY.search(line)):
                server.host, server.port = found["host"], int(found["port"])
                ready.set()
        ready.set()

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    try:
        if not ready.wait(200) or not server.port:
            raise RuntimeError("hyaena serve did not start: " + "".join(server.log[-20:]))
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(10)
        process.stderr.close()
