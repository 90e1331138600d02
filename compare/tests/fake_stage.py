"""Stage folders whose `bench` writes a synthetic result: for tests of the runner."""

from pathlib import Path

MAIN = """
import json, os, sys
arguments = sys.argv[sys.argv.index("bench") + 1:]
options = dict(zip(arguments[::2], arguments[1::2]))
with open("calls.txt", "a") as log:
    log.write(json.dumps([{name!r}, options]) + "\\n")
{body}
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "result.json")) as file:
    text = file.read()
with open(options["--output"], "w") as file:
    file.write(text)
"""


def make_stage(
    root: Path, name: str, result_text: str, *, options: str = "", body: str = ""
) -> None:
    """A stage folder; `options` is a line of its EngineConfig, `body` runs before it writes."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(MAIN.format(name=name, body=body))
    (folder / "result.json").write_text(result_text)
    lines = "".join(f"    {line}\n" for line in ("max_model_len: int = 8", options) if line)
    (folder / "config.py").write_text(f"raise ImportError('read, never imported')\n"
                                      f"class EngineConfig:\n{lines}")  # fmt: skip
