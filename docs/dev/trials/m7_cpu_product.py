"""A CPU in bfloat16: torch's packed 4-bit product against weights that are written out.

    PYTHONPATH=.:shared python docs/dev/trials/m7_cpu_product.py MODEL 1 docs/dev/data/RESULT.json

MODEL is a folder that m7_gptq can run, 1 the number of threads. Both models are in one process and
take turns; each number is the least of five runs. Steps are (time of 18 tokens - time of 2) / 16,
after prompts of 8; prompts are of 256 tokens and never the same.
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from folovllm.request import SamplingParams
from m7_gptq.llm import LLM
from m7_gptq.quantized_linear import CpuInt4Product

NUM_RUNS = 5
BATCHES = (1, 2, 4, 8, 16, 32)


def load(model: str) -> LLM:
    return LLM(model, dtype="bfloat16", device="cpu", max_model_len=512, kv_cache_bytes=1 << 26)


def seconds(llm: LLM, num_requests: int, prompt_len: int, max_tokens: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    prompts: list[Any] = [
        {"prompt_token_ids": torch.randint(5, 4000, (prompt_len,), generator=generator).tolist()}
        for _ in range(num_requests)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def main(model: str, num_threads: int, target: Path) -> None:
    torch.set_num_threads(num_threads)
    packed = load(model)
    can_compute = CpuInt4Product.can_compute
    CpuInt4Product.can_compute = classmethod(lambda *arguments: False)  # type: ignore[method-assign, assignment]
    written = load(model)
    CpuInt4Product.can_compute = can_compute  # type: ignore[method-assign]
    llms = {"packed": packed, "written_out": written}
    rows: dict[str, dict[str, float]] = {
        name: {"weight_bytes": llm.model.num_parameter_bytes} for name, llm in llms.items()
    }
    for batch in BATCHES:
        for name in llms:
            rows[name][f"step_ms_at_batch_{batch}"] = float("inf")
        for run in range(NUM_RUNS):
            for name, llm in llms.items():
                short, long = (seconds(llm, batch, 8, n, 100 * batch + run) for n in (2, 18))
                key = f"step_ms_at_batch_{batch}"
                rows[name][key] = min(rows[name][key], round((long - short) / 16e-3, 2))
    for name in llms:
        rows[name]["prompt_256_ms"] = float("inf")
    for run in range(NUM_RUNS):
        for name, llm in llms.items():
            value = round(1e3 * seconds(llm, 1, 256, 1, 7000 + run), 1)
            rows[name]["prompt_256_ms"] = min(rows[name]["prompt_256_ms"], value)
    content = {
        "command": f"docs/dev/trials/m7_cpu_product.py MODEL {num_threads}",
        "model": "SmolLM2-135M-Instruct, 4 bits, groups of 64, symmetric, gptq",
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "note": "other jobs ran on the same two cores",
        "rows": rows,
    }
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
