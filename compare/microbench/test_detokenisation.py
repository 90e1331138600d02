"""Cost of turning one output into text, token by token."""

from pathlib import Path
from typing import Any

import pytest

from folovllm.request import SamplingParams
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.detokenizer import IncrementalDetokenizer
from folovllm.text.tokenizer import Tokenizer
from folovllm.workloads.workload import read_prompts

NUM_TOKENS = 1000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(save_byte_level_tokenizer(directory))


@pytest.mark.parametrize("stop", [None, ["\n\n\n", "never said"]], ids=["no-stop", "two-stops"])
def test_incremental_detokenisation(
    benchmark: Any, tokenizer: Tokenizer, stop: list[str] | None
) -> None:
    """A thousand tokens in several scripts, one at a time, from first to last."""
    text = "".join(prompt.text for prompt in read_prompts())
    token_ids = tokenizer.encode(text, add_special_tokens=False)[:NUM_TOKENS]
    params = SamplingParams(stop=stop)

    def detokenise() -> str:
        detokenizer = IncrementalDetokenizer(tokenizer, [], params)
        pieces = [detokenizer.append(token_id) for token_id in token_ids]
        return "".join([*pieces, detokenizer.finish()])

    assert benchmark(detokenise) == tokenizer.decode(token_ids)
