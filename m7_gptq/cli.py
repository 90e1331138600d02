"""What this stage has beside the commands of every stage: quantize, dequantize, perplexity."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from folovllm.cli.main import EXIT_INTERRUPTED, EXIT_USAGE
from folovllm.cli.options import add_field_flags, given_fields
from folovllm.hardware import describe_environment
from folovllm.model.config import ModelConfig
from folovllm.model.loader import (
    load_model,
    resolve_device,
    resolve_dtype,
    resolve_model_directory,
)
from folovllm.text.tokenizer import Tokenizer

from .calibration import calibration_tokens
from .default_model import LayerBar, quantized_default_model
from .gptq import QuantizationConfig
from .packing import V1, V2
from .perplexity import Protocol, count_windows, perplexity, store_perplexity
from .quantize_model import (
    FIRST_TOKEN_WEIGHT,
    Job,
    Method,
    dequantize_checkpoint,
    quantize_checkpoint,
)
from .quantized_linear import linears_of

COMMANDS = ("quantize", "dequantize", "perplexity")


def main(argv: Sequence[str]) -> int:
    """Run one of COMMANDS; a mistake of the user is one line and status 2."""
    options = _parser().parse_args(argv)
    try:
        commands = {"quantize": _quantize, "dequantize": _dequantize, "perplexity": _perplexity}
        commands[options.command](options)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the next layer", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    quantize = commands.add_parser("quantize", help="write a quantised checkpoint")
    quantize.add_argument("--method", choices=[method.value for method in Method], default="gptq")
    quantize.add_argument("--format", choices=[V1, V2], default=V1, help="as AutoGPTQ names it")
    quantize.add_argument("--calibration", type=Path, help="a text; default: one of our own")
    quantize.add_argument("--num-sequences", type=int, default=128, metavar="INT")
    quantize.add_argument("--sequence-len", type=int, default=512, metavar="INT")
    quantize.add_argument(
        "--first-token-weight",
        type=float,
        default=FIRST_TOKEN_WEIGHT,
        metavar="FLOAT",
        help="of a sequence, for q, k and v; 1: as published",
    )
    quantize.add_argument(
        "--quantize-lm-head",
        action="store_true",
        help="also the matrix of the logits; a tied embedding stays at 16 bits beside it",
    )
    add_field_flags(quantize.add_argument_group("quantisation"), QuantizationConfig)
    dequantize = commands.add_parser(
        "dequantize", help="write the weights of a quantised checkpoint at 16 or 32 bits"
    )
    for command in (quantize, dequantize):
        command.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    perplexity = commands.add_parser("perplexity", help="of any checkpoint on a text")
    perplexity.add_argument("--text", type=Path, required=True, metavar="FILE")
    perplexity.add_argument("--window", type=int, default=512, metavar="INT")
    perplexity.add_argument("--num-windows", type=int, metavar="INT", help="default: all")
    perplexity.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON that it is added to, as for compare"
    )
    for command in commands.choices.values():
        command.add_argument(
            "--model",
            required=command is not dequantize,
            metavar="PATH|ID",
            help="default of dequantize: the embedded model at 4 bits",
        )
        command.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N")
        command.add_argument(
            "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
        )
    return parser


def _quantize(options: argparse.Namespace) -> None:
    source = resolve_model_directory(options.model)
    device = resolve_device(options.device)
    job = Job(
        source=source,
        target=options.output,
        config=QuantizationConfig(**given_fields(options, QuantizationConfig)),
        method=Method(options.method),
        checkpoint_format=options.format,
        first_token_weight=options.first_token_weight,
        quantize_lm_head=options.quantize_lm_head,
        device=device,
        dtype=resolve_dtype(options.dtype, ModelConfig.from_directory(source), device),
    )
    tokens = calibration_tokens(
        Tokenizer(source), options.calibration, options.num_sequences, options.sequence_len
    )
    with LayerBar(source) as bar:
        quantize_checkpoint(job, tokens, bar.report)
    print(f"written to {options.output}")


def _dequantize(options: argparse.Namespace) -> None:
    source = resolve_model_directory(options.model or quantized_default_model())
    dtype = resolve_dtype(options.dtype, ModelConfig.from_directory(source), torch.device("cpu"))
    dequantize_checkpoint(source, options.output, dtype)
    print(f"written to {options.output}")


def _perplexity(options: argparse.Namespace) -> None:
    source = resolve_model_directory(options.model)
    text = options.text.read_bytes()
    token_ids = Tokenizer(source).encode(text.decode("utf-8"))
    model = load_model(source, device=options.device, dtype=options.dtype, linears=linears_of)

    def report(done: int, total: int) -> None:
        print(f"\rwindow {done}/{total}", end="", file=sys.stderr, flush=True)

    value = perplexity(model, token_ids, options.window, options.num_windows, report)
    print(file=sys.stderr)
    print(f"perplexity {value:.3f}")
    if options.output is not None:
        protocol = Protocol(
            text=options.text.name,
            text_sha256=hashlib.sha256(text).hexdigest(),
            window=options.window,
            num_windows=count_windows(len(token_ids), options.window, options.num_windows),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        found = {"quantization": model.config.quantization, "perplexity": value}
        environment = {"environment": describe_environment()}
        store_perplexity(options.output, protocol, {"name": source.name, **found, **environment})
