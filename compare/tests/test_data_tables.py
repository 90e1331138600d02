"""Tables of profiles and kernel benchmarks in documents, from files made up here."""

import json

import pytest

from compare.data_tables import attention_table, data_tables
from compare.documents import update_documents

GROUP = {
    "group": "attention", "count": 2, "total_s": 4e-6, "num_bytes": 8e6, "num_flops": 2e9,
    "limit_s": 2e-6, "limit_fraction": 0.5,
}  # fmt: skip
STEP = {
    "step_s": 1e-3, "kernels_s": 8e-4, "num_launches": 5, "groups": [GROUP],
    "kernels": [{"name": "_decode_kernel", "count": 2, "total_s": 4e-6}],
}  # fmt: skip
PROFILE = {
    "stage": "m4_flash", "device": "nvidia-h200", "batch_size": 1, "context_len": 512,
    "num_layers": 2, "dtype": "bfloat16", "decode": STEP, "prompt": STEP,
}  # fmt: skip


def attention_row(backend: str, seconds: float, query_len: int = 1) -> dict[str, object]:
    return {
        "batch_size": 8, "query_len": query_len, "seq_len": 16384, "num_heads": 16,
        "num_kv_heads": 8, "head_dim": 128, "block_size": 16,
        "backend": backend, "seconds": seconds,
        "bytes_per_s": 2e12, "flops_per_s": 3e14, "floor_s": 1e-5,
    }  # fmt: skip


def attention_content() -> dict[str, object]:
    return {
        "rows": [
            attention_row("triton", 2e-5),
            attention_row("flash_attn_3", 3e-5),
            attention_row("triton", 4e-5, query_len=512),
        ],
        "ceilings": {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14, "dtype": "bfloat16"},
        "environment": {"device": "NVIDIA H200"},
    }


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "docs/dev/data"
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    (folder / "attention.json").write_text(json.dumps(attention_content()))
    (folder / "something_else.json").write_text("{}")
    (folder / "rows.json").write_text("[1, 2]")
    return tmp_path


def test_attention_table_has_a_line_per_case_and_a_column_per_backend():
    lines = attention_table(attention_content()).splitlines()
    assert lines[0].count("|") == 5
    assert (
        "8 x 1, 16,384, 16/8 of 128, 16 | 20.0 µs, 2.00 TB/s | 30.0 µs, 2.00 TB/s | 10 µs"
        in lines[2]
    )
    assert "8 x 512, 16,384, 16/8 of 128, 16 | 40.0 µs, 300 TFLOP/s | – | 10 µs" in lines[3]
    assert "4.00 TB/s" in lines[-1] and "800 TFLOP/s" in lines[-1]


def test_files_with_a_table_reach_their_markers_in_documents(root):
    assert sorted(data_tables(root)) == ["data/attention", "data/profile"]
    document = root / "docs/note.md"
    document.write_text("<!-- compare:data/profile:begin -->\n<!-- compare:data/profile:end -->\n")
    assert update_documents(root, data_tables(root)) == [document]
    text = document.read_text()
    assert "| attention | 2 | 4 | 8.0 | 2.0 | 2 | 50% |" in text
    assert "| `_decode_kernel` | 2 | 1.0 | 4 |" in text
