"""The command line of this stage: `generate`, `chat`, `bench`, `profile`, and those of `cli`."""

import sys

from folovllm.cli.main import main

from . import LLM, cli

if __name__ == "__main__":
    is_own = len(sys.argv) > 1 and sys.argv[1] in cli.COMMANDS
    raise SystemExit(cli.main(sys.argv[1:]) if is_own else main(LLM))
