"""An LLM whose processes all replay steps, from graphs that run the recorded step again."""

from typing import Any

from folovllm.testing.fake_graphs import FakeGraphRecorder
from m6_prefix.llm import LLM


class GraphedLLM(LLM):
    """In a file of its own, because the other processes of a model import it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        runner = self.engine.model_runner  # type: ignore[attr-defined]
        runner.graphs = runner._capture(FakeGraphRecorder())
