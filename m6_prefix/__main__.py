"""The command line of this stage: `generate`, `chat`, `bench`, `profile`."""

from folovllm.cli.main import main

from . import LLM

if __name__ == "__main__":
    raise SystemExit(main(LLM))
