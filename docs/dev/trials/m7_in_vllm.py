"""Does vLLM compute with a checkpoint of m7_gptq what m7_gptq computes? It needs a GPU and vLLM.

    export PYTHONPATH=.:shared
    python docs/dev/trials/m7_in_vllm.py --write build/for_vllm
    python docs/dev/trials/m7_in_vllm.py build/for_vllm/* > result.json

`--write` quantises random models of a few layers, for which no GPU is needed. Each folder is a
quantised checkpoint. vLLM (a process of its own, per dtype) continues four prompts of token ids
greedily; this stage's float32 model then computes the logits of each of those positions. A token is
right if it is our largest logit, or less than MARGIN below it: vLLM keeps scales at the model's 16
bits and rounds activations to them. The stage's own engine runs the same prompts in the same dtype.
Prints one JSON object; the log of vLLM goes to stderr, and says which kernels it chose. Exit status
1 if any token is off by more.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

NUM_NEW_TOKENS = 32
MARGIN = 1.5
"""Of logits; of bfloat16 between 16 and 32 the step is 0.125. The stage itself, in bfloat16 on a
CPU, was off by up to 0.74 on a random model. Zero points that are off by one: by 18 and 98."""
DTYPES = ("float16", "bfloat16")
PROMPTS = (
    [1, 260, 378, 314, 506, 260, 314, 338],
    [1, 400, 411, 287, 260, 451, 319],
    [5, 9, 33, 12, 40, 7, 21, 58, 3, 17],
    [1, 88, 260, 480, 282, 392, 335, 260, 499, 288],
)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-128": ("qwen3", {"group_size": 128}),
    "llama-32-act-order": ("llama", {"group_size": 32, "desc_act": True}),
}
_CHOSEN = re.compile(r"Using (\w+) for AutoGPTQLinearMethod")


def in_vllm(folder: str, dtype: str) -> None:
    """The child: one line of JSON, behind a mark, because vLLM prints as well."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        gpu_memory_utilization=0.3,
        generation_config="vllm",
        seed=0,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    print("TOKENS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


def run_vllm(folder: str, dtype: str) -> dict[str, Any]:
    environment = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", folder, dtype],
        env={**environment, **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-20000:], done.stderr[-20000:], file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    kernels = sorted(set(_CHOSEN.findall(done.stdout + done.stderr)))
    return {"kernels": kernels, "tokens": json.loads(lines[0].removeprefix("TOKENS "))}


def in_ours(folder: str, dtype: str) -> list[list[int]]:
    from folovllm.request import SamplingParams
    from m7_gptq.llm import LLM

    llm = LLM(folder, dtype=dtype, max_model_len=128, kv_cache_bytes=1 << 26)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def shortfalls(folder: str, answers: list[list[int]]) -> list[float]:
    """Of every token, how far its logit is below the largest, computed in float32 on a CPU."""
    import torch

    from folovllm.model.loader import load_model
    from m7_gptq.quantized_linear import linears_of

    model = load_model(folder, dtype="float32", device="cpu", linears=linears_of)
    groups = model.config.num_heads // model.config.num_kv_heads

    def attend(layer_idx: int, q: Any, k: Any, v: Any) -> Any:
        k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        result = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, is_causal=True
        )
        return result.transpose(0, 1)

    missing: list[float] = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([*prompt, *answer])
        with torch.no_grad():
            hidden = model(tokens, torch.arange(len(tokens)), attend)
            logits = model.compute_logits(hidden)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, tokens[len(prompt) :, None])[:, 0]
        missing += (logits.amax(dim=1) - chosen).tolist()
    return missing


def compare(folder: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for dtype in DTYPES:
        row = rows[dtype] = run_vllm(folder, dtype)
        if "tokens" not in row:
            continue
        ours = in_ours(folder, dtype)
        for name, tokens in (("vllm", row["tokens"]), ("m7_gptq", ours)):
            missing = shortfalls(folder, tokens)
            row[f"{name}_largest_shortfall"] = max(missing)
            row[f"{name}_tokens_that_are_our_argmax"] = sum(value == 0.0 for value in missing)
        row["m7_gptq_tokens"] = ours
        row["equal_tokens_of_both"] = sum(
            a == b
            for x, y in zip(ours, row["tokens"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
    return rows


def write(target: Path) -> None:
    import torch

    from compare.peers.checkpoint import save_checkpoint
    from folovllm.model.loader import load_model
    from m7_gptq.gptq import QuantizationConfig
    from m7_gptq.quantize_model import Job, quantize_checkpoint

    architectures = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    tokens = torch.randint(0, 512, (16, 128), generator=torch.Generator().manual_seed(0))
    for name, (model_type, options) in OURS.items():
        source = target.parent / f"{target.name}-{model_type}"
        source.mkdir(parents=True, exist_ok=True)
        config = {**SHAPE, "model_type": model_type, "architectures": [architectures[model_type]]}
        (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_checkpoint(
            load_model(source, load_format="dummy", dtype="bfloat16", device="cpu"), source
        )
        job = Job(
            source=source,
            target=target / name,
            config=QuantizationConfig(**options),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        quantize_checkpoint(job, tokens, lambda report: None)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(Path(sys.argv[2]))
    elif sys.argv[1] == "--child":
        in_vllm(sys.argv[2], sys.argv[3])
    else:
        results = {Path(folder).name: compare(folder) for folder in sys.argv[1:]}
        print(json.dumps({"margin": MARGIN, "rows": results}, indent=2))
        rows = [row for folder in results.values() for row in folder.values()]
        sys.exit(any(row.get("vllm_largest_shortfall", MARGIN + 1) > MARGIN for row in rows))
