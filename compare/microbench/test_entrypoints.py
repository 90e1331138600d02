"""Cost of what stands around an engine: reading prompts, and handing out a step's tokens."""

from pathlib import Path
from typing import Any

import pytest

from folovllm.entrypoints.output_processor import OutputProcessor
from folovllm.entrypoints.output_state import CompletionState, PromptState
from folovllm.entrypoints.prompts import Prompt, parse_prompt, split_prompts
from folovllm.interfaces import StepOutput, StepStats, TokenOutput
from folovllm.request import Request, SamplingParams
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.tokenizer import Tokenizer

NUM_RUNNING = 256
NUM_STEPS = 200
STATS = StepStats(
    num_scheduled_tokens=NUM_RUNNING,
    num_scheduled_requests=NUM_RUNNING,
    num_running=NUM_RUNNING,
    num_waiting=0,
    num_preemptions=0,
    num_kv_tokens_live=0,
    num_kv_tokens_reserved=0,
    num_kv_tokens_capacity=0,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(save_byte_level_tokenizer(directory))


def make_prompts(tokenizer: Tokenizer, stop: list[str] | None) -> list[PromptState]:
    params = SamplingParams(max_tokens=10_000, stop=stop)
    prompts = []
    for index in range(NUM_RUNNING):
        request = Request(
            request_id=f"r{index}", prompt_token_ids=[index + 5], sampling_params=params
        )
        state = CompletionState(request, 0, tokenizer)
        prompts.append(PromptState(request.request_id, Prompt(None, [index + 5]), [state], 0.0))
    return prompts


def make_step(token_id: int) -> StepOutput:
    tokens = (TokenOutput(f"r{index}", token_id, None, None) for index in range(NUM_RUNNING))
    return StepOutput(tuple(tokens), STATS)


@pytest.mark.parametrize("stop", [None, ["\n\n\n", "never said"]], ids=["no-stop", "two-stops"])
def test_process_step(benchmark: Any, tokenizer: Tokenizer, stop: list[str] | None) -> None:
    """A token for each of 256 requests, whose texts nobody reads before the end."""
    processor = OutputProcessor()
    prompts = make_prompts(tokenizer, stop)
    for prompt in prompts:
        processor.add(prompt, prompt.completions[0])
    step = make_step(tokenizer.encode("dog", add_special_tokens=False)[0])
    benchmark.pedantic(processor.process, args=(step, 0.0), rounds=NUM_STEPS, warmup_rounds=5)


def test_outputs_at_the_end(benchmark: Any, tokenizer: Tokenizer) -> None:
    """The texts of 256 requests of 200 tokens, all at once."""
    token_ids = tokenizer.encode("The quick dog. " * NUM_STEPS, add_special_tokens=False)

    def answered() -> tuple[tuple[list[PromptState]], dict[str, Any]]:
        prompts = make_prompts(tokenizer, None)
        for prompt in prompts:
            for token_id in token_ids[:NUM_STEPS]:
                prompt.completions[0].append(TokenOutput("", token_id, None, None))
        return (prompts,), {}

    outputs = benchmark.pedantic(
        lambda prompts: [prompt.output() for prompt in prompts], setup=answered, rounds=5
    )
    assert len(outputs[-1].outputs[0].token_ids) == NUM_STEPS


def test_one_prompt_of_many_token_ids(benchmark: Any) -> None:
    """16,384 ids, from what a caller gives to what an engine takes."""
    token_ids = [index % 512 for index in range(16_384)]
    prompt = benchmark(lambda: parse_prompt(split_prompts(token_ids)[0], 0, None, 512))
    assert prompt.token_ids == token_ids


def test_many_prompts_of_few_token_ids(benchmark: Any) -> None:
    """10,000 prompts of 4 ids."""
    prompts = [[index % 512, 1, 2, 3] for index in range(10_000)]

    def parse() -> list[Prompt]:
        return [
            parse_prompt(item, index, None, 512)
            for index, item in enumerate(split_prompts(prompts))
        ]

    assert len(benchmark(parse)) == len(prompts)
