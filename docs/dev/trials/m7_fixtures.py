"""Makes m7_gptq/tests/fixtures: toy checkpoints that other programs quantised, and their answers.

Three environments, because the programs exclude each other. `sources` runs in the project's own;
`gptqmodel` in one with gptqmodel 7.7.0 (torch 2.14.1, Transformers 5.24.0, Python 3.12);
`autogptq` in one with auto-gptq 0.7.1 (torch 2.2.2, Transformers 4.40.2, optimum 1.19.2, peft
0.10.0, Python 3.10). No GPU is needed.

    PYTHONPATH=.:shared python docs/dev/trials/m7_fixtures.py sources build/fixtures
    python docs/dev/trials/m7_fixtures.py gptqmodel build/fixtures m7_gptq/tests/fixtures
    python docs/dev/trials/m7_fixtures.py autogptq build/fixtures m7_gptq/tests/fixtures

Each fixture is the checkpoint as that program wrote it (the file with the weights renamed to
model.safetensors where it has another name, without a tokenizer and without names of
folders in its configs), and
`reference.safetensors`: `tokens`, a prompt and what the program continued it with greedily, and
`logits`, what it computes for them with float32 activations from its own unpacking.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

PROMPT = [5, 9, 33, 12, 40, 7, 21, 58, 3, 17]
NUM_NEW_TOKENS = 12
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-96": (  # no multiple of 64: written by m7_interoperability.py only
        "llama",
        {"tie_word_embeddings": False, "hidden_size": 96, "num_key_value_heads": 2},
    ),
    "llama-256": (  # two groups of 128 in every row of down_proj
        "llama",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 1,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_key_value_heads": 1,
        },
    ),
}
GPTQMODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "gptqmodel-llama-v1": ("llama", {"group_size": 32}),
    "gptqmodel-qwen2-act-order": ("qwen2", {"group_size": 32, "desc_act": True}),
    "gptqmodel-qwen3-v2-asymmetric": (
        "qwen3",
        {"group_size": 32, "sym": False, "format": "gptq_v2"},
    ),
    "gptqmodel-llama-v1-asymmetric": ("llama", {"group_size": 32, "sym": False}),
    "gptqmodel-qwen3-one-group": ("qwen3", {"group_size": -1, "desc_act": True}),
    "gptqmodel-llama-128-v2": ("llama-256", {"group_size": 128, "format": "gptq_v2"}),
    "gptqmodel-llama-head": ("llama", {"group_size": 32, "lm_head": True}),
    "gptqmodel-qwen2-8-bits": ("qwen2", {"group_size": 32, "bits": 8}),
}
AUTOGPTQ: dict[str, tuple[str, dict[str, Any]]] = {
    "autogptq-llama": ("llama", {"group_size": 32}),
    "autogptq-qwen2-act-order-asymmetric": (
        "qwen2",
        {"group_size": 32, "desc_act": True, "sym": False},
    ),
    "autogptq-llama-one-group": ("llama", {"group_size": -1, "sym": False}),
    "autogptq-llama-128-static-groups": (
        "llama-256",
        {"group_size": 128, "desc_act": True, "static_groups": True},
    ),
}
KEPT = ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors")


def make_sources(folder: Path) -> None:
    """Random toy models in float16, with a tokenizer of numbers because loaders ask for one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from folovllm.testing.toy_models import ToyFamily, write_toy_model

    for name, (model_type, overrides) in SOURCES.items():
        shape = {"vocab_size": 64, "intermediate_size": 64, **overrides}
        target = write_toy_model(ToyFamily(name, model_type, shape), folder / name)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float16)
        if model_type == "qwen2":
            generator = torch.Generator().manual_seed(1)
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.data.normal_(0.0, 0.5, generator=generator)
        model.save_pretrained(target)
        vocabulary = {str(number): number for number in range(64)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="0", pad_token="0", eos_token="2"
        ).save_pretrained(target)
        # Older versions of Transformers look for the names of their time.
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config |= {"torch_dtype": "float16", "rope_theta": 10000.0}
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def calibration() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 64, (32, 64), generator=generator).tolist()


def write_reference(model: Any, target: Path) -> None:
    """model: the program's, as it loads its own checkpoint; float32 activations."""
    import torch
    from safetensors.torch import save_file

    tokens = list(PROMPT)
    with torch.no_grad():
        while len(tokens) < len(PROMPT) + NUM_NEW_TOKENS:
            logits = model(torch.tensor([tokens])).logits[0]
            tokens.append(int(logits[-1].argmax()))
        logits = model(torch.tensor([tokens])).logits[0]
    save_file(
        {"tokens": torch.tensor(tokens), "logits": logits.float().contiguous()},
        str(target / "reference.safetensors"),
    )


def keep(written: Path, target: Path) -> None:
    """The checkpoint's own files, of those that the program wrote."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (written / name).is_file():
            shutil.copyfile(written / name, target / name)
    for name in ("config.json", "quantize_config.json"):
        path = target / name
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'\s*"(offload_to_disk_path|_name_or_path)": "[^"]*",?', "", text)
        json.loads(text)
        path.write_text(text, encoding="utf-8")


def with_gptqmodel(sources: Path, fixtures: Path) -> None:
    import os

    # Its pool of threads wants two for loading, and gives itself half of the cores.
    os.cpu_count = lambda: 4
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    for name, (source, options) in GPTQMODEL.items():
        written = sources / "written" / name
        config = QuantizeConfig(
            **{"bits": 4, "desc_act": False, "act_group_aware": False} | options
        )
        model = GPTQModel.load(str(sources / source), config)
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration()]
        model.quantize(rows, batch_size=1)
        model.save(str(written))
        keep(written, fixtures / name)
        loaded = GPTQModel.load(
            str(written), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
        )
        write_reference(loaded.model.float(), fixtures / name)
        print(name, flush=True)


def with_autogptq(sources: Path, fixtures: Path) -> None:
    import auto_gptq.modeling._base
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    # It takes a GPU for granted when it quantises.
    auto_gptq.modeling._base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    for name, (source, options) in AUTOGPTQ.items():
        written = sources / "written" / name
        config = BaseQuantizeConfig(**{"bits": 4, "desc_act": False} | options)
        torch.cuda.is_available = lambda: True
        model = AutoGPTQForCausalLM.from_pretrained(
            str(sources / source), config, torch_dtype=torch.float32
        )
        torch.cuda.is_available = lambda: False
        rows = [
            {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
            for ids in calibration()
        ]
        model.quantize(rows, use_triton=False, cache_examples_on_gpu=False)
        model.model.half()  # rounded on a CPU in float32, published in float16
        model.save_quantized(str(written), use_safetensors=True)
        loaded = AutoGPTQForCausalLM.from_quantized(
            str(written),
            device="cpu",
            use_triton=False,
            disable_exllama=True,
            disable_exllamav2=True,
            use_safetensors=True,
        )
        for path in written.glob("gptq_model-*.safetensors"):
            path.rename(written / "model.safetensors")
        keep(written, fixtures / name)
        answering = loaded.model.float()
        for module in answering.modules():  # Qwen2 of this version keeps its angles in float16
            if hasattr(module, "_set_cos_sin_cache"):
                module._set_cos_sin_cache(512, "cpu", torch.float32)
        write_reference(answering, fixtures / name)
        print(name, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "sources":
        make_sources(Path(sys.argv[2]))
    else:
        make = {"gptqmodel": with_gptqmodel, "autogptq": with_autogptq}[sys.argv[1]]
        make(Path(sys.argv[2]), Path(sys.argv[3]))
