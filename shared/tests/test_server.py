"""The server through real clients: openai's package, curl, half requests, and clients that go."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folovllm.testing.server_process import SERVED_LLM, ServerProcess
from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.tokenizer import Tokenizer

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

SECRET = "the password is swordfish"


def serve(tokenizer_path, log, *flags):
    """A server in a process of its own, whose model repeats the prompt."""
    return ServerProcess(SERVED_LLM, tokenizer_path, log, *flags)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def server(tokenizer_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(tokenizer_path, log, "--step-ms", "2") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_completes(client, tokenizer):
    assert [model.id for model in client.models.list()] == ["toy"]
    prompt = "Hello world"
    length = len(tokenizer.encode(prompt))
    answer = client.completions.create(
        model="toy", prompt=prompt, max_tokens=length, n=2, logprobs=2
    )
    assert [choice.text for choice in answer.choices] == [prompt] * 2
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == prompt and logprobs.text_offset[0] == 0
    assert logprobs.token_logprobs == [-0.25] * length
    assert all(len(top) == 3 for top in logprobs.top_logprobs)
    assert answer.usage.prompt_tokens == length and answer.usage.completion_tokens == 2 * length


def test_prompts_are_texts_or_ids_or_lists_of_them_and_may_be_echoed(client, tokenizer):
    ids = tokenizer.encode("lazy dog")
    for prompt, texts in (
        (ids, ["lazy dog"]),
        (["lazy dog", "Hello world"], ["lazy dog", "Hello world"]),
        ([ids, ids], ["lazy dog"] * 2),
    ):
        answer = client.completions.create(model="toy", prompt=prompt, max_tokens=1, echo=True)
        for choice, text in zip(answer.choices, texts, strict=True):
            first = tokenizer.token_text(tokenizer.encode(text)[0])
            assert choice.text == text + first
        parts = client.completions.create(
            model="toy", prompt=prompt, max_tokens=1, echo=True, stream=True
        )
        joined = dict.fromkeys(range(len(texts)), "")
        for part in parts:
            for choice in part.choices:
                joined[choice.index] += choice.text
        assert list(joined.values()) == [choice.text for choice in answer.choices]


def test_openai_chats_in_one_piece_and_in_chunks(client, tokenizer):
    messages = [{"role": "user", "content": [{"type": "text", "text": "你好 dog"}]}]
    call = {"model": "toy", "messages": messages, "max_completion_tokens": 25, "n": 2}
    call |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**call)
    text = "user: 你好 dog\nassistant: "
    for choice in whole.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == (text * 2)[: len(choice.message.content)]
        assert len(choice.logprobs.content) == 25
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True})
    )
    joined, reasons, num_tokens = ["", ""], [None, None], 0
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            joined[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
            num_tokens += len(choice.logprobs.content) if choice.logprobs else 0
    assert joined == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * 2 and num_tokens == 50
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens_details.cached_tokens == 0


def test_stop_string_ends_a_stream(client):
    chunks = client.completions.create(
        model="toy", prompt="quick fox", max_tokens=500, stop=["k f"], stream=True
    )
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "quic"


def test_many_async_clients_get_each_its_own_answer(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(number):
                prompt, text = f"number {number} ", ""
                stream = await client.completions.create(
                    model="toy", prompt=prompt, max_tokens=40, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                assert text == (prompt * 40)[: len(text)] and len(text) > len(prompt)

            await asyncio.gather(*(ask(number) for number in range(32)))

    asyncio.run(run())
    server.wait_until_idle()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    body = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}'
    command = ["curl", "-s", f"{server.url}/v1/chat/completions", "-d", body]
    command += ["-H", "Content-Type: application/json"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"]


def test_tokenize_and_detokenize(server, tokenizer):
    ids = tokenizer.encode("Hello world")
    answer = server.http.post(
        "/tokenize", json={"prompt": "Hello world", "return_token_strs": True}
    )
    assert answer.json()["tokens"] == ids and "".join(answer.json()["token_strs"]) == "Hello world"
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Hello world"}
    messages = [{"role": "user", "content": "Hi"}]
    chat = server.http.post("/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(messages)
    assert chat["count"] == len(chat["tokens"]) and chat["max_model_len"] == 2048


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", {"prompt": "a", "model": "other"}, 404, "model"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": ""}, 400, "prompt"),
        ("completions", {"prompt": [10**30]}, 400, "prompt"),
        ("completions", {"prompt": [100_000]}, 400, "prompt"),
        ("completions", {"prompt": [-1], "echo": True}, 400, "prompt"),
        ("completions", {"prompt": ["a"] * 65}, 400, "prompt"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "n": 65}, 400, "n"),
        ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ("completions", {"prompt": "a", "stop": ["a"] * 17}, 400, "stop"),
        ("completions", {"prompt": "a", "seed": 1 << 70}, 400, "seed"),
        ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        (
            "completions",
            {"prompt": "a", "echo": True, "logprobs": 1, "prompt_logprobs": 2},
            400,
            "prompt_logprobs",
        ),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a" * 9000}]},
            400,
            "messages",
        ),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {**CHAT, "chat_template": "x"}, 400, "chat_template"),
        ("chat/completions", {**CHAT, "response_format": {"type": "x"}}, 400, "response_format"),
    ],
)
def test_error_names_the_field(server, path, body, status, param):
    answer = server.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(["n", "max_tokens", "stop", "logprobs", "logit_bias", "stream", "top_p"])
# What no prompt is: so no body of these is one that can be answered.
WRONG_PROMPT = JSON.filter(lambda value: not isinstance(value, str | list)) | st.just([])
BODIES = st.one_of(
    st.binary(max_size=30),
    JSON.map(json.dumps).map(str.encode),
    st.builds(
        lambda prompt, others: json.dumps(
            {**others, "prompt": prompt, "messages": prompt}
        ).encode(),
        WRONG_PROMPT,
        st.dictionaries(FIELDS, JSON),
    ),
    st.just(b'{"prompt": "' + b"\\ud800" + b'"}'),
    st.just(b"[" * 5000),
    st.just(b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}"),
    st.just(b'{"prompt": "a", "model": "\\ud800"}'),
    st.just(b'{"prompt": "a", "\\ud800": 1}'),
    st.just(b'{"prompt": "a", "temperature": NaN}'),
)


def test_malformed_bodies_are_the_clients_mistakes(server):
    paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]

    @settings(
        max_examples=200, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(path=st.sampled_from(paths), body=BODIES)
    def run(path, body):
        answer = server.http.post(path, content=body)
        assert 400 <= answer.status_code < 500, (body, answer.text)
        assert answer.json()["error"]["message"]

    run()
    server.wait_until_idle()
    assert server.http.get("/health").status_code == 200


def test_clients_that_vanish_leave_nothing(server):
    server.wait_until_idle()
    num_descriptors = server.num_descriptors()
    body = json.dumps({"prompt": "Hello world", "max_tokens": 1900, "stream": True}).encode()
    plain = json.dumps({"prompt": "Hello world", "max_tokens": 1900}).encode()

    def head(length):
        return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length

    halves = [
        b"POST /v1/comple",
        head(len(body))[:-10],
        head(len(body)) + body[:20],
        head(len(body)) + body,
        head(len(plain)) + plain,
    ]
    for number in range(100):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(halves[number % len(halves)])
            if number % 10 == 3:
                connection.recv(100)  # it has begun
    server.wait_until_idle()
    end = time.perf_counter() + 5
    while server.num_descriptors() > num_descriptors + 2:
        assert time.perf_counter() < end
        time.sleep(0.02)
    assert server.http.get("/health").status_code == 200


def test_client_that_goes_is_aborted_within_steps(server):
    server.wait_until_idle()
    before = server.metric("generation_tokens_total")
    body = {"prompt": "Hello", "max_tokens": 1900, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    server.wait_until_idle()
    assert server.metric("generation_tokens_total") - before < 500  # of 1,900


def test_slow_reader_gets_all_of_it(server):
    body = {"prompt": "Hello world", "max_tokens": 1500, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        server.wait_until_idle(20)  # the engine does not wait for us
        rest = [line for line in lines if line.startswith("data: {")]
    texts = [json.loads(line.removeprefix("data: ")) for line in [first, *rest]]
    text = "".join(part["choices"][0]["text"] for part in texts)
    assert text == "Hello world" * 250  # of six tokens each


def test_limits_keys_and_the_end(tokenizer_path, tmp_path):
    log = tmp_path / "log"
    flags = ["--api-key", "swordfish-1", "--max-body-bytes", "500", "--max-queue-len", "2"]
    server = serve(tokenizer_path, log, "--step-ms", "50", "--max-num-seqs", "1", *flags)
    call = {"prompt": SECRET, "max_tokens": 40}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer ключ".encode()},
    ):
        for path in ("/v1/completions", "/tokenize"):
            assert server.http.post(path, json=call, headers=headers).status_code == 401
        assert server.http.get("/v1/models", headers=headers).status_code == 401
        assert server.http.get("/health", headers=headers).status_code == 200
    server.http.headers["Authorization"] = "Bearer swordfish-1"
    long = {"prompt": "a" * 1000}
    assert server.http.post("/v1/completions", json=long).status_code == 413
    chunks = (b"a" * 100 for _ in range(100))
    assert server.http.post("/v1/completions", content=chunks).status_code == 413
    asyncio.run(check_queue_and_drain(server, call))
    assert server.process.wait(20) == 0
    assert SECRET not in log.read_text()


async def check_queue_and_drain(server, call):
    headers = {"Authorization": "Bearer swordfish-1"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=20) as client:

        def post():
            return asyncio.create_task(client.post("/v1/completions", json={**call, "n": 1}))

        refused = await client.post("/v1/completions", json={**call, "n": 3})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        running = [post(), post()]
        while (
            'num_requests_running{engine="0",model_name="toy"} 1'
            not in (await client.get("/metrics")).text
        ):
            await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        while (await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.02)
        draining = await client.post("/v1/completions", json=call)
        assert draining.status_code == 503 and int(draining.headers["retry-after"]) > 0
        for answer in await asyncio.gather(*running):
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--exit-at-step", "40"], "the engine's process ended with status 7"),
        (["--hang-at-step", "40", "--step-timeout-s", "0.5"], "the engine hangs"),
    ],
)
def test_dead_engine_answers_everybody_and_ends_the_server(tokenizer_path, tmp_path, flags, reason):
    log = tmp_path / "log"
    server = serve(tokenizer_path, log, "--step-ms", "5", *flags)

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def stream():
                chunks = await client.completions.create(
                    model="toy", prompt="Hello", max_tokens=1900, stream=True
                )
                async for _ in chunks:
                    pass

            call = client.completions.create(model="toy", prompt="Hello", max_tokens=1900)
            return await asyncio.gather(stream(), call, return_exceptions=True)

    streamed, whole = asyncio.run(run())
    assert isinstance(streamed, openai.APIError) and reason in str(streamed)
    assert isinstance(whole, openai.InternalServerError)
    assert server.process.wait(20) == 1
    assert f"error: {reason}" in log.read_text()


def test_address_in_use_is_said_before_anything_is_loaded(server, tokenizer_path):
    command = [sys.executable, "-c", SERVED_LLM, "serve", "--model", str(tokenizer_path)]
    command += ["--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "cannot listen" in done.stderr


def test_missing_extra_is_named(tokenizer_path):
    code = f"import sys; sys.modules['uvicorn'] = None; {SERVED_LLM}"
    command = [sys.executable, "-c", code, "serve", "--model", str(tokenizer_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "folovllm[serve]" in done.stderr and "uvicorn" in done.stderr


def test_nothing_else_imports_what_serving_needs():
    code = "import sys, folovllm.cli.main; print([n for n in sys.argv[1:] if n in sys.modules])"
    command = [sys.executable, "-c", code, "starlette", "uvicorn", "zmq", "msgspec"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
