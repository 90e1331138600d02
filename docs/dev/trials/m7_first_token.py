"""Which matrices lose what, and what the first token of a sequence has to do with it. On a CPU.

    PYTHONPATH=.:shared python docs/dev/trials/m7_first_token.py --model DIR --calibration FILE \\
        --text FILE --out FILE.json [--num-sequences 64]

Quicker than m7_quality.py, and of the causes alone: Hessians are recorded once, in the model as it
is, so that a trial is only its rounding. Perplexity is that of the first 8 windows of 512. Errors
are |WX - QX|² / |WX|² in percent, for inputs of that text, which no Hessian has seen: of all tokens
(mean over layers), and for q, k and v of the first token of every window, layer by layer.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.model.loader import load_model, resolve_model_directory
from folovllm.model.transformer import CausalLM
from folovllm.text.tokenizer import Tokenizer
from m7_gptq.gptq import QuantizationConfig, relative_error
from m7_gptq.perplexity import perplexity
from m7_gptq.quantize_model import Method, plain_linears, record_hessians, run_in_place
from m7_gptq.whole_sequences import Activations, embed

LENGTH, NUM_WINDOWS = 512, 8
QKV, OUT, GATE_UP, DOWN = (
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
ALL = (QKV, OUT, GATE_UP, DOWN)

Hessians = list[dict[str, torch.Tensor]]
"""Layer -> matrix -> [num_inputs, num_inputs]"""


def record(model: CausalLM, token_ids: torch.Tensor) -> tuple[Hessians, Hessians]:
    """Of all tokens, and of the first of every sequence. token_ids: [num_sequences, LENGTH]."""
    activations = embed(token_ids, model.embed_tokens)
    every: Hessians = []
    first: Hessians = []
    for layer in model.layers:
        alone = Activations(*(tensor[:, :1] for tensor in activations))
        every.append(record_hessians(layer, model.rope, activations))
        first.append(record_hessians(layer, model.rope, alone))
        run_in_place(layer, model.rope, activations)
    return every, first


def trials() -> list[dict[str, Any]]:
    """Options of `Bench.run`."""
    wide, act = QuantizationConfig(), QuantizationConfig(desc_act=True)
    narrow = QuantizationConfig(group_size=32, sym=False)
    rtn, for_qkv = Method.RTN, {QKV: 32.0}
    return [
        {"method": rtn, "config": wide},
        {"config": wide},
        {"config": wide, "weights": dict.fromkeys(ALL, 0.0)},
        *({"method": rtn, "config": wide, "matrices": (name,)} for name in ALL),
        *({"config": wide, "matrices": (name,)} for name in ALL),
        *({"config": wide, "matrices": (n,), "weights": {n: 32.0}} for n in (QKV, GATE_UP, DOWN)),
        {"config": wide, "matrices": (QKV,), "weights": {QKV: 512.0}},
        {"config": wide, "weights": for_qkv},
        {"config": act},
        {"config": act, "weights": for_qkv},
        {"config": QuantizationConfig(desc_act=True, mse=True), "weights": for_qkv},
        {"config": QuantizationConfig(group_size=32), "weights": for_qkv},
        {"method": rtn, "config": narrow},
        {"config": narrow},
        {"config": narrow, "weights": for_qkv},
        {
            "config": QuantizationConfig(group_size=32, sym=False, desc_act=True),
            "weights": for_qkv,
        },
    ]


class Bench:
    """A model with the Hessians of two texts."""

    def __init__(self, model: CausalLM, seen: torch.Tensor, unseen: torch.Tensor) -> None:
        self.model, self.windows = model, unseen
        self.weights = [
            {name: linear.weight.clone() for name, linear in plain_linears(layer).items()}
            for layer in model.layers
        ]
        self.seen, self.seen_first = record(model, seen)
        self.unseen, self.unseen_first = record(model, unseen)

    def perplexity(self) -> float:
        return perplexity(self.model, self.windows.flatten().tolist(), LENGTH)

    def run(
        self,
        config: QuantizationConfig,
        method: Method = Method.GPTQ,
        matrices: tuple[str, ...] = ALL,
        weights: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """weights: matrix -> how often the first token of a sequence counts, if not once."""
        errors: dict[str, list[float]] = {name: [] for name in matrices}
        first_token: list[float] = []
        for index, layer in enumerate(self.model.layers):
            for name, linear in plain_linears(layer).items():
                weight = self.weights[index][name]
                linear.weight.copy_(weight)
                if name not in matrices:
                    continue
                share = ((weights or {}).get(name, 1.0) - 1.0) / LENGTH
                hessian = self.seen[index][name] + share * self.seen_first[index][name]
                matrix = method.quantize(weight, hessian, config)
                linear.weight.copy_(matrix.dequantize())
                error = relative_error(weight, matrix, self.unseen[index][name])
                errors[name].append(100 * error)
                if name == QKV:
                    error = relative_error(weight, matrix, self.unseen_first[index][name])
                    first_token.append(round(100 * error, 2))
        return {
            "method": method.value,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": config.desc_act,
            "mse": config.mse,
            "matrices": list(matrices),
            "first_token_weights": weights or {},
            "perplexity": round(self.perplexity(), 3),
            "mean_errors": {name: round(sum(e) / len(e), 3) for name, e in errors.items()},
            "first_token_errors_qkv": first_token,
        }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--calibration", "--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--most-trials", type=int)
    options = parser.parse_args()
    source = resolve_model_directory(options.model)
    tokenizer = Tokenizer(source)

    def sequences(file: Path, number: int) -> torch.Tensor:
        ids = tokenizer.encode(file.read_text(encoding="utf-8"))
        return torch.tensor(ids[: number * LENGTH]).view(number, LENGTH)

    seen = sequences(options.calibration, options.num_sequences)
    unseen = sequences(options.text, NUM_WINDOWS)
    bench = Bench(load_model(source, device="cpu", dtype="float32"), seen, unseen)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "model": source.name,
        "calibration": f"{options.num_sequences} x {LENGTH} tokens of {options.calibration.name}",
        "text": options.text.name,
        "source_perplexity": round(bench.perplexity(), 3),
        "trials": [],
    }
    for trial in trials()[: options.most_trials]:
        result["trials"].append(bench.run(**trial))
        write_json_atomically(options.out, result)
        last = result["trials"][-1]
        print({key: value for key, value in last.items() if "first_token_e" not in key}, flush=True)


if __name__ == "__main__":
    main()
