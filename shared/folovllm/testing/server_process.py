"""A server in a process of its own, for tests that talk with it over HTTP."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self


def serving(module: str, llm_class: str = "LLM") -> str:
    """A program: the command line of this class of the module."""
    return (
        f"import sys; from folovllm.cli.main import main; from {module} import {llm_class}; "
        f"sys.exit(main({llm_class}, sys.argv[1:]))"
    )


SERVED_LLM = serving("folovllm.testing.served_llm", "ServedLLM")
"""That of the model that repeats the prompt."""
_END_S = 60.0


class ServerProcess:
    """Started, and reachable, when this is made; as a context manager it is stopped at the end."""

    def __init__(
        self,
        program: str,
        model: Path,
        log: Path,
        *flags: str,
        api_key: str | None = None,
        start_s: float = 90.0,
    ) -> None:
        """program: of `serving`, or SERVED_LLM; log: a file for all that it writes.

        api_key: what `http` sends; start_s: seconds that it may take to listen.
        """
        self.log = log
        command = [sys.executable, "-c", program, "serve", "--model", str(model)]
        command += ["--port", "0", "--served-model-name", "toy", *flags]
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
        end = time.perf_counter() + start_s
        while (found := re.search(r"http://127.0.0.1:(\d+)", log.read_text())) is None:
            assert self.process.poll() is None and time.perf_counter() < end, log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        import httpx  # no package that folovllm needs

        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def metric(self, name: str) -> float:
        """A sample of the one engine that there is."""
        line = re.search(rf"^vllm:{name}{{.*}} (\S+)$", self.http.get("/metrics").text, re.M)
        assert line is not None, name
        return float(line[1])

    def wait_until_idle(self, within_s: float = 5.0) -> None:
        """Until the engine runs nothing."""
        end = time.perf_counter() + within_s
        while self.metric("num_requests_running") or self.metric("num_requests_waiting"):
            assert time.perf_counter() < end
            time.sleep(0.02)

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> None:
        """With SIGTERM, unless it has ended; it must end as a server that nothing is wrong with."""
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(_END_S) == 0, self.log.read_text()
            assert "Traceback" not in self.log.read_text(), self.log.read_text()
        finally:
            self.process.kill()
