"""Checkpoints that m7_gptq wrote, in other programs: do they compute the same logits?

`write` quantises toy models, runs them with this stage and stores logits and tokens beside them;
`read` runs where Transformers 5, optimum and gptqmodel 7.7.0 are (docs/dev/trials/m7_fixtures.py
says with what versions), loads each with Transformers and with GPTQModel, and prints how far
they are off. The other direction is a test: m7_gptq/tests/test_other_programs.py.

    export PYTHONPATH=.:shared
    python docs/dev/trials/m7_fixtures.py sources build/toys
    python docs/dev/trials/m7_interoperability.py write build/toys build/ours
    python docs/dev/trials/m7_interoperability.py read build/ours results.json

`write` takes further quantised checkpoints, which it copies: `… write build/toys build/ours
models/SmolLM2-135M-Instruct-GPTQ`.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PROMPT = [5, 9, 33, 12, 40, 7, 21, 58, 3, 17]
NUM_NEW_TOKENS = 12
OURS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-v1": ("llama", {"group_size": 32}, "gptq"),
    "llama-v2-asymmetric": ("llama", {"group_size": 32, "sym": False}, "gptq_v2"),
    "qwen2-act-order": ("qwen2", {"group_size": 32, "desc_act": True}, "gptq"),
    "qwen2-act-order-static-groups": (
        "qwen2",
        {"group_size": 32, "desc_act": True, "static_groups": True},
        "gptq",
    ),
    "qwen3-one-group": ("qwen3", {"group_size": -1}, "gptq"),
    "llama-128": ("llama-256", {"group_size": 128}, "gptq"),
    "llama-head": ("llama", {"group_size": 32, "quantize_lm_head": True}, "gptq"),
    "qwen3-tied-head": ("qwen3", {"group_size": 32, "quantize_lm_head": True}, "gptq"),
    "llama-last-group-smaller": ("llama-96", {"group_size": 64}, "gptq"),
    "qwen3-8-bits": ("qwen3", {"group_size": 32, "bits": 8}, "gptq"),
}


def write(sources: Path, target: Path, further: list[Path]) -> None:
    import torch

    from m7_gptq.gptq import QuantizationConfig
    from m7_gptq.quantize_model import Job, quantize_checkpoint

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 64, (32, 64), generator=generator)
    for name, (source, options, checkpoint_format) in OURS.items():
        layers = {key: value for key, value in options.items() if key != "quantize_lm_head"}
        job = Job(
            source=sources / source,
            target=target / name,
            config=QuantizationConfig(**layers),
            quantize_lm_head=options.get("quantize_lm_head", False),
            checkpoint_format=checkpoint_format,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        quantize_checkpoint(job, tokens, lambda report: None)
    for folder in further:
        shutil.copytree(folder, target / folder.name)
    for folder in sorted(path for path in target.iterdir() if path.is_dir()):
        write_answer(folder)


def write_answer(folder: Path) -> None:
    """This stage's tokens, by its engine, and logits of a pass over all of them."""
    import torch

    from folovllm.model.loader import load_model
    from folovllm.model.weights import save_safetensors
    from folovllm.request import SamplingParams
    from m7_gptq.llm import LLM
    from m7_gptq.quantized_linear import linears_of

    llm = LLM(folder, dtype="float32", device="cpu", max_model_len=64, kv_cache_bytes=1 << 26)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    tokens = torch.tensor(PROMPT + list(output.outputs[0].token_ids))
    model = load_model(folder, dtype="float32", device="cpu", linears=linears_of)
    groups = model.config.num_heads // model.config.num_kv_heads

    def attend(layer_idx: int, q: Any, k: Any, v: Any) -> Any:
        k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        result = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, is_causal=True
        )
        return result.transpose(0, 1)

    with torch.no_grad():
        hidden = model(tokens, torch.arange(len(tokens)), attend)
        logits = model.compute_logits(hidden)
    save_safetensors({"tokens": tokens, "logits": logits}, folder.with_suffix(".answer"))


def read(folder: Path, results: Path) -> None:
    # GPTQModel's pool of threads wants two for loading, and gives itself half of the cores.
    os.cpu_count = lambda: 4
    import gptqmodel
    import torch
    import transformers
    from safetensors.torch import load_file

    rows: dict[str, Any] = {}
    for answer in sorted(folder.glob("*.answer")):
        ours, name = load_file(str(answer)), str(answer.with_suffix(""))
        config = transformers.GPTQConfig(bits=4, backend="torch")
        config = {"quantization_config": config} if not is_eight_bits(Path(name)) else {}
        rows[answer.stem] = {}
        for program, load in {
            "transformers": lambda name=name, config=config: (
                transformers.AutoModelForCausalLM.from_pretrained(
                    name, dtype=torch.float16, device_map="cpu", **config
                )
            ),
            "gptqmodel": lambda name=name: (
                gptqmodel.GPTQModel.load(
                    name, device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
                ).model
            ),
        }.items():
            try:
                rows[answer.stem][program] = difference(in_float32(load()), ours)
            except Exception as error:  # what the program refuses is a result
                rows[answer.stem][program] = {"refused": f"{type(error).__name__}: {error}"[:300]}
    content = {
        "command": "docs/dev/trials/m7_interoperability.py read",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gptqmodel": gptqmodel.__version__,
        },
        "rows": rows,
    }
    results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))


def in_float32(model: Any) -> Any:
    """What Transformers refuses to do for quantised models: their scales become float32 too."""
    import torch

    return torch.nn.Module.float(model)


def is_eight_bits(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]["bits"] == 8


def difference(model: Any, ours: dict[str, Any]) -> dict[str, Any]:
    import torch

    tokens = ours["tokens"]
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].float()
        continued = list(PROMPT)
        while len(continued) < len(tokens):
            continued.append(int(model(torch.tensor([continued])).logits[0, -1].argmax()))
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    return {
        "largest_difference_of_logits": (logits - ours["logits"]).abs().max().item(),
        "largest_logit": ours["logits"].abs().max().item(),
        "same_tokens": continued == tokens.tolist(),
        "computed_by": sorted(kinds),
    }


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[2:]]
    if sys.argv[1] == "write":
        write(paths[0], paths[1], paths[2:])
    else:
        read(paths[0], paths[1])
