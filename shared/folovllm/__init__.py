"""FoloVLLM's shared package: everything that is never the subject of a stage."""

from .outputs import CompletionOutput, RequestOutput
from .request import SamplingParams

__all__ = ["SamplingParams", "RequestOutput", "CompletionOutput"]
