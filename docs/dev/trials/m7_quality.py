"""What quantising loses, setting by setting: perplexity, and the error of every matrix.

    PYTHONPATH=.:shared python docs/dev/trials/m7_quality.py --model DIR --calibration FILE \\
        --text FILE --out FILE.json --device cuda [--trials NAME,NAME…]

All in one process: nothing is written but the result, after every trial. Perplexity is that of the
whole text, in windows of 512 and 2,048 (`--windows`, `--num-windows`). A matrix's error is |WX -
QX|² / |WX|², for inputs of the calibration text, and for inputs of another part of it that no
Hessian has seen (*held out*); beside GPTQ's there is that of rounding the same matrix to nearest.
Bytes are those of packed matrices (q, k, v as one; gate, up as one), with scales, zero points and
`g_idx`. The machine's weights and sums are float32.

`--calibration FILE` can be shared/folovllm/data/calibration.txt, the text of the package.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.model.loader import load_model, resolve_model_directory
from folovllm.model.transformer import CausalLM, DecoderLayer
from folovllm.text.tokenizer import Tokenizer
from m7_gptq.gptq import QuantizationConfig, relative_error, round_to_nearest
from m7_gptq.packing import V2, pack_matrix
from m7_gptq.perplexity import perplexity
from m7_gptq.quantize_model import (
    Method,
    plain_linears,
    record_hessians,
    run_in_place,
)
from m7_gptq.whole_sequences import Activations, embed

HELD_OUT_LEN = 512
"""Tokens of a sequence at the end of the calibration text, which no trial is calibrated with."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to quantise the model. The name says what is not as usual."""

    method: Method = Method.GPTQ
    config: QuantizationConfig = field(default_factory=QuantizationConfig)
    num_sequences: int = 128
    sequence_len: int = 512
    matrices: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    """The others stay as they are."""
    first_token_weight: float = 1.0
    """How often the first token of every sequence counts in a Hessian."""
    weighted: tuple[str, ...] = ("qkv_proj",)
    """In whose."""
    one_by_one: bool = False
    """Record each matrix when those before it in the layer are quantised ("true sequential")."""


def trials() -> dict[str, Trial]:
    """Name -> trial; the rows of the table first."""
    rtn, gptq = Method.RTN, Method.GPTQ
    table: dict[str, Trial] = {}

    def add(name: str, method: Method = gptq, **options: Any) -> None:
        known = {key: options.pop(key) for key in list(options) if key in Trial.__annotations__}
        table[name] = Trial(method=method, config=QuantizationConfig(**options), **known)

    add("rtn-g128", rtn)
    add("gptq-g128")
    add("gptq-g128-act", desc_act=True)
    add("rtn-g32", rtn, group_size=32)
    add("gptq-g32", group_size=32)
    add("gptq-g32-act", group_size=32, desc_act=True)
    add("rtn-g32-asym", rtn, group_size=32, sym=False)
    add("gptq-g32-asym", group_size=32, sym=False)
    add("gptq-g128-first-32", first_token_weight=32.0)
    add("gptq-g128-act-first-32", first_token_weight=32.0, desc_act=True)
    add("gptq-g32-first-32", first_token_weight=32.0, group_size=32)
    add("gptq-g32-asym-first-32", first_token_weight=32.0, group_size=32, sym=False)
    add("gptq-g128-act-mse-first-32", first_token_weight=32.0, desc_act=True, mse=True)
    add("gptq-g128-first-4", first_token_weight=4.0)
    add("gptq-g128-first-512", first_token_weight=512.0)
    add("gptq-g128-first-0", first_token_weight=0.0)
    everywhere = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    add("gptq-g128-first-32-everywhere", first_token_weight=32.0, weighted=everywhere)
    for matrix in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        add(f"rtn-g128-only-{matrix}", rtn, matrices=(matrix,))
        add(f"gptq-g128-only-{matrix}", matrices=(matrix,))
    add("gptq-g128-512x128", num_sequences=512, sequence_len=128)
    add("gptq-g128-32x2048", num_sequences=32, sequence_len=2048)
    add("gptq-g128-16x512", num_sequences=16)
    add("gptq-g128-512x512", num_sequences=512)
    add("gptq-g128-one-by-one", one_by_one=True)
    add("gptq-g128-damp-0.1", damp_percent=0.1)
    add("gptq-g128-mse", mse=True)
    add("gptq-g128-act-mse", mse=True, desc_act=True)
    add("gptq-g128-static", desc_act=True, static_groups=True)
    add("rtn-g128-mse", rtn, mse=True)
    add("gptq-g64", group_size=64)
    add("rtn-g64", rtn, group_size=64)
    add("rtn-row", rtn, group_size=-1)
    for name, size in (("g32", 32), ("g64", 64), ("row", -1)):
        add(f"gptq-{name}-act-first-32", group_size=size, desc_act=True, first_token_weight=32.0)
    for bits in (2, 3, 8):
        add(f"rtn-b{bits}-g128", rtn, bits=bits)
        add(f"gptq-b{bits}-g128-act-first-32", bits=bits, desc_act=True, first_token_weight=32.0)
    return table


@dataclass(frozen=True)
class Texts:
    """Tokens of what is read, on the host."""

    calibration: list[int]
    evaluation: list[int]
    num_held_out: int
    """Sequences of `HELD_OUT_LEN`."""

    def sequences(self, num_sequences: int, length: int) -> torch.Tensor:
        """[num_sequences, length] int64; fewer, if the text has no more beside the held out."""
        usable = len(self.calibration) - self.num_held_out * HELD_OUT_LEN
        num_sequences = min(num_sequences, usable // length)
        return torch.tensor(self.calibration[: num_sequences * length]).view(-1, length)

    def held_out(self) -> torch.Tensor:
        """[num_held_out, HELD_OUT_LEN] int64"""
        length = self.num_held_out * HELD_OUT_LEN
        return torch.tensor(self.calibration[-length:]).view(-1, HELD_OUT_LEN)


class Bench:
    """A model that is quantised again and again."""

    def __init__(self, model: CausalLM, texts: Texts) -> None:
        self.model, self.texts = model, texts
        self.weights = [
            {name: linear.weight.clone() for name, linear in plain_linears(layer).items()}
            for layer in model.layers
        ]
        self.packed_bytes = 0
        """Of the matrices that the last trial quantised."""

    def quantize(self, trial: Trial) -> dict[str, list[dict[str, float]]]:
        """Quantise all layers; returns kind of error -> one per layer: matrix -> error."""
        model = self.model
        for layer, weights in zip(model.layers, self.weights, strict=True):
            for name, linear in plain_linears(layer).items():
                linear.weight.copy_(weights[name])
        self.packed_bytes = 0
        sequences = self.texts.sequences(trial.num_sequences, trial.sequence_len)
        seen, fresh = (
            embed(tokens.to(model.device), model.embed_tokens)
            for tokens in (sequences, self.texts.held_out())
        )
        errors: dict[str, list[dict[str, float]]] = {}
        for layer in model.layers:
            for kind, values in self._quantize_layer(layer, trial, seen, fresh).items():
                errors.setdefault(kind, []).append(values)
            for activations in (seen, fresh):
                run_in_place(layer, model.rope, activations)
        return errors

    def _quantize_layer(
        self, layer: DecoderLayer, trial: Trial, seen: Activations, fresh: Activations
    ) -> dict[str, dict[str, float]]:
        """Kind of error -> matrix -> error."""
        rope = self.model.rope
        linears = plain_linears(layer)
        unseen = record_hessians(layer, rope, fresh)
        hessians = self._hessians(layer, trial, seen)
        kinds = (
            "calibration", "rtn_calibration", "held_out", "rtn_held_out", "held_out_first_tokens"
        )  # fmt: skip
        errors: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
        only_first = record_first_tokens(layer, self.model, fresh)
        for name, linear in linears.items():
            if name.partition(".")[2] not in trial.matrices:
                continue
            if trial.one_by_one:
                hessians = self._hessians(layer, trial, seen)
            weight = linear.weight.clone()
            matrix = trial.method.quantize(weight, hessians[name], trial.config)
            linear.weight.copy_(matrix.dequantize())
            packed = pack_matrix(matrix, trial.config.bits, V2)
            self.packed_bytes += sum(tensor.nbytes for tensor in packed)
            nearest = round_to_nearest(weight, trial.config)
            errors["calibration"][name] = relative_error(weight, matrix, hessians[name])
            errors["rtn_calibration"][name] = relative_error(weight, nearest, hessians[name])
            errors["held_out"][name] = relative_error(weight, matrix, unseen[name])
            errors["rtn_held_out"][name] = relative_error(weight, nearest, unseen[name])
            errors["held_out_first_tokens"][name] = relative_error(weight, matrix, only_first[name])
        return errors

    def _hessians(
        self, layer: DecoderLayer, trial: Trial, seen: Activations
    ) -> dict[str, torch.Tensor]:
        hessians = record_hessians(layer, self.model.rope, seen)
        if trial.first_token_weight != 1.0:
            # The Hessians are means over tokens: of all, and of those that stand first.
            share = (trial.first_token_weight - 1.0) / trial.sequence_len
            first = record_first_tokens(layer, self.model, seen)
            for name, hessian in hessians.items():
                if name.partition(".")[2] in trial.weighted:
                    hessian += share * first[name]
        return hessians


def record_first_tokens(
    layer: DecoderLayer, model: CausalLM, activations: Activations
) -> dict[str, torch.Tensor]:
    """Hessians of the first token of every sequence alone; it sees no other one."""
    first = Activations(*(tensor[:, :1] for tensor in activations))
    return record_hessians(layer, model.rope, first)


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, float]:
    """Window -> perplexity."""
    return {
        str(window): perplexity(bench.model, bench.texts.evaluation, window, options.num_windows)
        for window in options.windows
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="of which perplexity is taken")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trials", default="", help="names, with commas; default: all")
    parser.add_argument("--windows", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--num-windows", type=int, help="default: all")
    parser.add_argument("--most-sequences", type=int, help="less calibration, for slow machines")
    parser.add_argument("--held-out", type=int, default=16, help="sequences for errors only")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no trial after that")
    return parser.parse_args(argv)


@torch.inference_mode()
def main() -> None:
    start = time.perf_counter()
    options = parse()
    known = trials()
    names = options.trials.split(",") if options.trials else list(known)
    most = options.most_sequences or max(trial.num_sequences for trial in known.values())
    chosen = {
        name: replace(known[name], num_sequences=min(most, known[name].num_sequences))
        for name in names
    }
    source = resolve_model_directory(options.model)
    tokenizer = Tokenizer(source)
    texts = Texts(
        *(
            tokenizer.encode(file.read_text(encoding="utf-8"))
            for file in (options.calibration, options.text)
        ),
        options.held_out,
    )
    model = load_model(source, device=options.device, dtype="float32")
    bench = Bench(model, texts)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "model": source.name,
        "calibration": options.calibration.name,
        "text": options.text.name,
        "num_windows": options.num_windows,
        "num_held_out": options.held_out,
        "matrix_weights": sum(
            weight.numel() for weights in bench.weights for weight in weights.values()
        ),
        "embedding_weights": model.embed_tokens.numel(),
        "trials": [{"name": "source", "perplexity": measure(bench, options)}],
    }
    for name, trial in chosen.items():
        if time.perf_counter() - start > options.seconds:
            break
        before = time.perf_counter()
        errors = bench.quantize(trial)
        quantized = time.perf_counter()
        entry = {
            "name": name,
            **json.loads(json.dumps(asdict(trial), default=lambda method: method.value)),
            "num_calibration_tokens": bench.texts.sequences(
                trial.num_sequences, trial.sequence_len
            ).numel(),
            "perplexity": measure(bench, options),
            "packed_bytes": bench.packed_bytes,
            "quantize_s": quantized - before,
            "perplexity_s": time.perf_counter() - quantized,
            "errors": errors,
        }
        result["trials"].append(entry)
        write_json_atomically(options.out, result)
        print(name, entry["perplexity"], f"{time.perf_counter() - before:.1f} s", flush=True)
    write_json_atomically(options.out, result)


if __name__ == "__main__":
    main()
