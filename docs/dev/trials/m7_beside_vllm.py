"""Steps and `nano` of vLLM with random 4-bit weights of Qwen3-8B; it needs a GPU and vLLM.

    PYTHONPATH=.:shared python docs/dev/trials/m7_beside_vllm.py OUT.json [--model qwen3-8b]

One run per kernel, the other by VLLM_DISABLED_KERNELS=MacheteLinearKernel; the file names what each
layer multiplies with, asked of the layers. A step is what a batch of prompts of 512 tokens takes
with 128 new ones, less what it takes with one, over 127; the median of three. The stage's side is
`python -m compare.session measure m7_gptq` with the same workloads, on the same card.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compare.peers.checkpoint import hf_config
from folovllm.model.config import ModelConfig
from folovllm.workloads.workload import WorkloadRequest, make_workload

BATCHES = (1, 8, 64, 256)
NUM_NEW_TOKENS = 128
QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "lm_head": False,
    # Without this list vLLM looks for quantised tensors in the files, finds no file, and runs the
    # model in bfloat16 without a word.
    "modules_in_block_to_quantize": [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ],
}


def kernels_of(worker: Any) -> list[str]:
    """Classes that the layers of a vLLM worker multiply with."""
    methods = [getattr(layer, "quant_method", None) for layer in worker.get_model().modules()]
    kernels = [getattr(method, "kernel", None) for method in methods]
    return sorted({type(kernel).__name__ for kernel in kernels if kernel is not None})


def peak_gib(worker: Any) -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def seconds(llm: Any, requests: list[WorkloadRequest], num_tokens: int | None = None) -> float:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
    params = [
        SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=num_tokens or request.output_len,
            detokenize=False,
        )
        for request in requests
    ]
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def measure(folder: str, config: ModelConfig) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        enable_prefix_caching=False,
        generation_config="vllm",
        seed=0,
    )
    result: dict[str, Any] = {"kernels": llm.collective_rpc(kernels_of)[0], "steps_ms": {}}
    if not result["kernels"]:
        raise RuntimeError("vLLM has no layer with a kernel for 4 bits: it runs in bfloat16")
    for batch in BATCHES:
        spec = f"fixed:batch={batch},input=512,output={NUM_NEW_TOKENS}"
        requests = list(make_workload(spec, vocab_size=config.vocab_size).requests)
        seconds(llm, requests, 2)
        tries = [
            (seconds(llm, requests) - seconds(llm, requests, 1)) / (NUM_NEW_TOKENS - 1)
            for _ in range(3)
        ]
        result["steps_ms"][batch] = round(statistics.median(tries) * 1e3, 3)
    requests = list(make_workload("nano", vocab_size=config.vocab_size).requests)
    num_tokens = sum(request.output_len for request in requests)
    result["nano_tokens_per_s"] = [round(num_tokens / seconds(llm, requests), 1) for _ in range(3)]
    result["peak_gib"] = round(llm.collective_rpc(peak_gib)[0], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-8b")
    args = parser.parse_args()
    config = ModelConfig.preset(args.model)
    with tempfile.TemporaryDirectory() as folder:
        settings = hf_config(config, "bfloat16") | {"quantization_config": QUANTIZATION}
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        result = measure(folder, config)
    import vllm

    result |= {
        "vllm": vllm.__version__,
        "device": torch.cuda.get_device_name(),
        "disabled": os.environ.get("VLLM_DISABLED_KERNELS", ""),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
