"""What a server over a real engine answers: structured outputs, echoes, priorities, cache hits."""

import asyncio
import json
import re
from typing import Any

import pytest

from folovllm.testing.async_contract import write_model_with_tokenizer
from folovllm.testing.server_process import ServerProcess, serving
from folovllm.text.tokenizer import Tokenizer
from m6_prefix import LLM, SamplingParams

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
openai = pytest.importorskip("openai")

PROMPT = "The quick brown fox jumps over the lazy dog."
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 99}, "ok": {"const": "你"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_model_with_tokenizer(tmp_path_factory.mktemp("model"))
    for name, changes in (
        ("config.json", {"max_position_embeddings": 4096}),  # so that a request runs for seconds
        ("generation_config.json", {"eos_token_id": 1}),  # 3, the toy's, is a quotation mark here
    ):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | changes))
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(model)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "4096"]
    flags += ["--max-num-seqs", "1", "--scheduling-policy", "priority", "--block-size", "8"]
    with ServerProcess(serving("m6_prefix"), model, log, *flags) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client, **call):
    """The text of an answer that ended by itself, in one piece and in chunks."""
    call = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "seed": 3, **call}
    call |= {"max_completion_tokens": 200}
    choice = client.chat.completions.create(**call).choices[0]
    chunks = list(client.chat.completions.create(**call, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    return text


def test_response_format_is_followed_in_one_piece_and_in_chunks(client, tokenizer):
    # A model that knows no JSON would go on and on.
    spaces = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_text(i).strip()]
    bias = dict.fromkeys(map(str, spaces), -100) | {str(tokenizer.encode("}")[0]): 100}
    schema = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}}
    found = json.loads(chat(client, response_format=schema, logit_bias=bias))
    assert found["ok"] == "你" and 1 <= found["size"] <= 99
    text = chat(client, response_format={"type": "json_object"}, logit_bias=bias)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": "[0-9]{3}-(cat|dog)"}, "[0-9]{3}-(cat|dog)"),
        ({"choice": ["yes", "nö", "你好"]}, "yes|nö|你好"),
        ({"grammar": 'start: "a" "b"? "c"', }, "ab?c"),
    ],
)  # fmt: skip
def test_structured_outputs_are_followed_by_every_completion(client, structure, pattern):
    call = {"model": "toy", "prompt": PROMPT, "max_tokens": 100, "n": 3, "seed": 1}
    call["extra_body"] = {"structured_outputs": structure}
    choices = client.completions.create(**call).choices
    assert all(re.fullmatch(pattern, choice.text) for choice in choices)
    joined = ["", "", ""]
    for chunk in client.completions.create(**call, stream=True):
        for choice in chunk.choices:
            joined[choice.index] += choice.text
    assert joined == [choice.text for choice in choices]


def test_prompt_logprobs_are_those_of_the_engine(client, model, tokenizer):
    call = {"model": "toy", "prompt": PROMPT, "max_tokens": 2, "temperature": 0.0}
    answer = client.completions.create(**call, extra_body={"prompt_logprobs": 2})
    found = answer.choices[0].model_extra["prompt_logprobs"]  # vLLM's, which openai does not know
    llm = LLM(model, device="cpu", dtype="float32", max_model_len=128)
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2)
    expected = llm.generate(PROMPT, params, use_tqdm=False)[0].prompt_logprobs
    assert expected is not None
    assert found[0] is None and len(found) == len(tokenizer.encode(PROMPT))
    for position, other in zip(found[1:], expected[1:], strict=True):
        assert other is not None
        assert list(position) == list(map(str, other))
        for entry, logprob in zip(position.values(), other.values(), strict=True):
            assert entry["logprob"] == pytest.approx(logprob.logprob, abs=1e-4)
            assert (entry["rank"], entry["decoded_token"]) == logprob[1:]


def test_echo_with_logprobs_tells_those_of_the_prompt_first(client, tokenizer):
    ids = tokenizer.encode(PROMPT)
    call = {"model": "toy", "prompt": [ids, ids[:5]], "max_tokens": 3, "temperature": 0.0}
    call |= {"logprobs": 2, "echo": True, "n": 2}
    asked = {"prompt_logprobs": 2}
    whole = client.completions.create(**call, extra_body=asked).choices
    for choice, prompt_ids in zip(whole, [ids, ids, ids[:5], ids[:5]], strict=True):
        told = choice.logprobs
        prompt = "".join(told.tokens[: len(prompt_ids)])
        assert prompt == tokenizer.decode(prompt_ids) and choice.text.startswith(prompt)
        assert len(told.tokens) == len(prompt_ids) + 3
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        of_prompt = choice.model_extra["prompt_logprobs"]
        for index in range(1, len(prompt_ids)):
            chosen = of_prompt[index][str(prompt_ids[index])]
            assert told.token_logprobs[index] == chosen["logprob"]
            assert len(told.top_logprobs[index]) in (2, 3)
        assert max(told.top_logprobs[-1].values()) == told.token_logprobs[-1]  # greedy
    check_streamed_echo_adds_up(client, call, whole)
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs") as error:
        client.completions.create(**call, extra_body={"prompt_logprobs": 5})
    assert error.value.param == "prompt_logprobs"


def check_streamed_echo_adds_up(client, call, whole):
    texts = [""] * len(whole)
    parts: list[dict[str, list[Any]]] = [{} for _ in whole]
    for chunk in client.completions.create(**call, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in choice.logprobs.to_dict().items():
                parts[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole]
    for part, choice in zip(parts, whole, strict=True):
        told = choice.logprobs
        assert part["tokens"] == told.tokens and part["text_offset"] == told.text_offset
        assert part["token_logprobs"][0] is None
        assert part["token_logprobs"][1:] == pytest.approx(told.token_logprobs[1:], abs=1e-4)
        assert list(map(list, part["top_logprobs"][1:])) == list(map(list, told.top_logprobs[1:]))


def test_echo_of_no_tokens_is_the_prompt_alone(client, tokenizer):
    ids = tokenizer.encode(PROMPT)
    call = {"model": "toy", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = client.completions.create(**call)
    choice = answer.choices[0]
    assert choice.text == PROMPT and choice.finish_reason == "length"
    assert len(choice.logprobs.token_logprobs) == len(ids)
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == len(ids)
    chunks = list(client.completions.create(**call, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT
    assert chunks[-1].choices[0].finish_reason == "length"
    plain = client.completions.create(model="toy", prompt=PROMPT, max_tokens=0, echo=True)
    assert plain.choices[0].text == PROMPT and plain.choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="toy", prompt=PROMPT, max_tokens=0)


def test_cached_tokens_are_told_in_usage(client, tokenizer):
    messages = [{"role": "user", "content": "Once upon a time. " * 8}]
    call = {"model": "toy", "messages": messages, "max_completion_tokens": 1}
    call["extra_body"] = {"cache_salt": "mine"}
    first = client.chat.completions.create(**call).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    expected = (first.prompt_tokens - 1) // 8 * 8
    assert client.chat.completions.create(**call).usage.prompt_tokens_details.cached_tokens == (
        expected
    )
    stream = client.chat.completions.create(
        **call, stream=True, stream_options={"include_usage": True}
    )
    assert list(stream)[-1].usage.prompt_tokens_details.cached_tokens == expected
    call["extra_body"] = {"cache_salt": "another's"}
    assert client.chat.completions.create(**call).usage.prompt_tokens_details.cached_tokens == 0


def test_priority_decides_who_is_next(server):
    ended = []

    async def ask(client, name, priority):
        await client.completions.create(
            model="toy", prompt=name, max_tokens=2, extra_body={"priority": priority}
        )
        ended.append(name)

    async def until_waiting(count):
        while server.metric("num_requests_waiting") != count:
            await asyncio.sleep(0.01)

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            running = await client.completions.create(
                model="toy", prompt="a", max_tokens=4000, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            await anext(aiter(running))
            asks = []
            for count, (name, priority) in enumerate((("late", 5), ("soon", 1), ("last", 9)), 1):
                asks.append(asyncio.create_task(ask(client, name, priority)))
                await until_waiting(count)
            await running.close()
            await asyncio.gather(*asks)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert ended == ["soon", "late", "last"]
