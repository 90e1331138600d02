"""The embedded model at 4 bits, made on first use."""

import sys
from pathlib import Path

import torch

from folovllm.cli.progress_bar import ProgressBar
from folovllm.entrypoints.llm import DEFAULT_MODEL
from folovllm.model.config import ModelConfig
from folovllm.model.loader import resolve_model_directory
from folovllm.text.tokenizer import Tokenizer

from .calibration import calibration_tokens
from .gptq import QuantizationConfig
from .packing import V2
from .quantize_model import Job, LayerReport, Method, quantize_checkpoint

QUANTIZED_MODEL = DEFAULT_MODEL.with_name(f"{DEFAULT_MODEL.name}-GPTQ")
"""Where it is kept, beside the one it is made from."""
_CONFIG = QuantizationConfig(group_size=32, sym=False)
"""Groups of 32 with zero points lost less than wider and symmetric ones in the trials of
docs/dev/milestone_7.md."""
_NUM_SEQUENCES, _SEQUENCE_LEN = 32, 512


def quantized_default_model() -> Path:
    """The folder of the quantised embedded model; makes it if it is not there."""
    if (QUANTIZED_MODEL / "config.json").is_file():
        return QUANTIZED_MODEL
    source = resolve_model_directory(DEFAULT_MODEL)
    print(f"quantising {source} into {QUANTIZED_MODEL}, once", file=sys.stderr)
    job = Job(
        source=source,
        target=QUANTIZED_MODEL,
        config=_CONFIG,
        method=Method.GPTQ,
        checkpoint_format=V2,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    tokens = calibration_tokens(Tokenizer(source), None, _NUM_SEQUENCES, _SEQUENCE_LEN)
    with LayerBar(source) as bar:
        quantize_checkpoint(job, tokens, bar.report)
    return QUANTIZED_MODEL


class LayerBar(ProgressBar):
    """A bar over a model's layers, with what the last one lost."""

    def __init__(self, source: Path) -> None:
        num_layers = ModelConfig.from_directory(source).num_layers
        super().__init__(num_layers, "Quantised layers", "layer")

    def report(self, report: LayerReport) -> None:
        """This layer is done, and all before it, perhaps by an earlier run."""
        errors = (
            f"{name.rpartition('.')[2].removesuffix('_proj')} {error:.2%}"
            for name, error in report.errors.items()
        )
        self.show(report.layer_idx + 1, f"error of {', '.join(errors)}")
