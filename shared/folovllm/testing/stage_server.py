"""A stage's server in a process of its own, with a toy model."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_PATIENCE_S = 90.0


class StageServer(NamedTuple):
    """It listens when there is one."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def stage_server(stage: str, model: Path, *flags: str) -> Iterator[StageServer]:
    """`python -m STAGE serve` at a free port; ended with SIGTERM unless it has ended before."""
    log = model / "server.log"
    command = [sys.executable, "-m", stage, "serve", "--model", str(model), "--port", "0", *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    end = time.perf_counter() + _PATIENCE_S
    try:
        while (found := re.search(r"http://[\d.]+:\d+", log.read_text())) is None:
            assert process.poll() is None and time.perf_counter() < end, log.read_text()
            time.sleep(0.05)
        yield StageServer(found[0], process)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
