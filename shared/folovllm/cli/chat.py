"""The interactive conversation of `python -m STAGE chat`."""

import time
from typing import TextIO

from ..entrypoints.llm import LLM
from ..request import SamplingParams
from .text import print_stream, statistics_line

_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class ChatSession:
    """A conversation that grows turn by turn; every answer sees all turns before it."""

    def __init__(
        self, llm: LLM, sampling_params: SamplingParams, system: str | None, out: TextIO
    ) -> None:
        """system: text of a first message that says how to behave; None for the template's own."""
        self._llm = llm
        self._sampling_params = sampling_params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._out = out

    def run(self, input_prompt: str) -> None:
        """Read lines from standard input until its end or /exit, and answer them.

        input_prompt: shown before each line, for example "> "; "" where input is not a terminal.
        """
        print(_COMMANDS, file=self._out)
        while True:
            try:
                line = input(input_prompt).strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print(f"\n{_COMMANDS}", file=self._out)
                continue
            if line == "/exit":
                break
            if line == "/reset":
                self._messages = list(self._opening)
                print("The conversation is forgotten.", file=self._out)
            elif line.startswith("/"):
                print(f"Unknown command {line.split()[0]}: {_COMMANDS}", file=self._out)
            elif line:
                self.answer(line)

    def answer(self, text: str) -> None:
        """Print the model's answer; both turns join the conversation, if there was an answer.

        What cannot be answered (a conversation beyond max_model_len) is reported and left out.
        """
        start = time.perf_counter()
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            stream = self._llm.stream(self._llm.render_chat(messages), self._sampling_params)
            last = print_stream(stream, self._out)
        except ValueError as error:
            print(f"error: {error} (/reset starts again)", file=self._out)
            return
        if last is None:
            return
        answer = last.outputs[0].text
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        print(statistics_line([last], time.perf_counter() - start), file=self._out)
