"""Conversations as prompts: forms of content, template options, tools, refusals by name."""

import json

import pytest
from transformers import AutoTokenizer

from folovllm.testing.toy_tokenizers import save_byte_level_tokenizer
from folovllm.text.chat import ChatOptions, TemplateTraits
from folovllm.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "dog"}
WITH_TOOLS = """
{%- if tools %}{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% endif %}
{%- for message in messages %}
{{- message.role }}: {% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{{- message.content }}
{%- if message.tool_calls %}{% for call in message.tool_calls %}
{{- call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{% endif %}
{%- if message.role == "tool" %}#{{ message.tool_call_id }}{% endif %};
{%- endfor %}
{%- if add_generation_prompt %}assistant:
{%- if enable_thinking is defined and enable_thinking is false %}<no-think>{% endif %}{% endif %}"""
WITH_PARTS = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% for part in content %}<{{ part.text }}>{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory):
    def make(template):
        path = tmp_path_factory.mktemp("chat")
        return Tokenizer(save_byte_level_tokenizer(path, chat_template=template))

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(WITH_TOOLS)


def render(tokenizer, messages, **options):
    ids = tokenizer.apply_chat_template(messages, ChatOptions(**options))
    return tokenizer.decode(ids, skip_special_tokens=False)


def text_part(text):
    return {"type": "text", "text": text}


def test_text_parts_are_joined_by_line_ends(tokenizer):
    parts = [text_part("one"), "two", {"text": "three"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == (
        "user: one\ntwo\nthree;assistant:"
    )


def test_template_that_loops_over_parts_gets_them(make_tokenizer):
    tokenizer = make_tokenizer(WITH_PARTS)
    messages = [USER, {"role": "user", "content": [text_part("a"), text_part("b")]}]
    assert render(tokenizer, messages) == "<dog><a><b>"
    assert render(tokenizer, messages, chat_template_content_format="string").count("<>") == 6


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}", True),
        (WITH_PARTS, True),
        (WITH_TOOLS, False),
        ("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}", False),
    ],
)  # fmt: skip
def test_loop_over_content_is_recognised(template, expected):
    assert TemplateTraits.of(template).loops_over_content == expected


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url"])
def test_part_that_is_no_text_is_refused_by_name(tokenizer, kind):
    content = [text_part("look"), {"type": kind, kind: {"url": "x"}}]
    with pytest.raises(
        ValueError, match=f"part 1 of the 'content' of message 1 is of type '{kind}'"
    ):
        render(tokenizer, [USER, {"role": "user", "content": content}])


def test_template_of_the_caller_takes_the_place_of_the_tokenizers(tokenizer, make_tokenizer):
    template = "{{ messages[0].content }}!"
    assert render(tokenizer, [USER], chat_template=template) == "dog!"
    assert render(make_tokenizer(None), [USER], chat_template=template) == "dog!"


def test_template_variables_reach_the_template(tokenizer):
    kwargs = {"enable_thinking": False}
    assert render(tokenizer, [USER], chat_template_kwargs=kwargs).endswith("assistant:<no-think>")
    assert render(tokenizer, [USER]).endswith("assistant:")


def test_variable_that_the_template_does_not_read_is_refused_by_name(tokenizer):
    with pytest.raises(
        ValueError, match="does not read 'thinking' of chat_template_kwargs; it .*enable"
    ):
        render(tokenizer, [USER], chat_template_kwargs={"thinking": True})  # fmt: skip


def test_final_message_is_continued_where_its_text_ends(tokenizer):
    messages = [USER, {"role": "assistant", "content": "The lazy"}]
    options = {"add_generation_prompt": False}
    assert render(tokenizer, messages, **options) == "user: dog;assistant: The lazy;"
    continued = render(tokenizer, messages, continue_final_message=True, **options)
    assert continued == "user: dog;assistant: The lazy"


def test_continuing_and_opening_a_turn_exclude_each_other():
    with pytest.raises(ValueError, match="set one of them to False"):
        ChatOptions(continue_final_message=True)


def test_tools_calls_and_their_results_are_rendered(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert render(tokenizer, messages, tools=tools) == (
        '[add]user: dog;assistant: (hm)add({"a": 1});tool: 2#c1;assistant:'
    )
    assert call["function"]["arguments"] == '{"a": 1}', "the caller's messages stay as they were"


def test_prompt_equals_that_of_transformers(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [USER, {"role": "assistant", "content": "x "}, USER]
    theirs = AutoTokenizer.from_pretrained(tokenizer.path).apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    options = ChatOptions(tools=tools, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.apply_chat_template(messages, options) == theirs


def test_tools_that_the_template_does_not_read_are_refused(make_tokenizer):
    plain = make_tokenizer("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="does not read tools"):
        render(plain, [USER], tools=[{"type": "function"}])
    assert render(plain, [USER], tools=[]) == "dog"


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "assistant", "content": None}, "message 0 needs a string or a list of text"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "message 0 holds the tool call"),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "add", "arguments": "{a"}}],
            },
            "arguments of a tool call in message 0 are no JSON",
        ),
    ],
)
def test_malformed_message_is_refused(tokenizer, message, match):
    with pytest.raises(ValueError, match=match):
        render(tokenizer, [message])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False"),
        ({"chat_template": 3}, "chat_template must be a text, got 3"),
        ({"chat_template_content_format": "parts"}, "one of auto, string, openai, got 'parts'"),
        ({"tools": {"name": "add"}}, "tools must be a list"),
        ({"tools": ["add"]}, "tools must be a list"),
        ({"chat_template_kwargs": ["x"]}, "chat_template_kwargs must map names to values"),
        ({"chat_template_kwargs": {"tools": []}}, "sets 'tools', which is no variable"),
    ],
)
def test_option_that_cannot_work_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ChatOptions(**options)


def test_broken_template_of_the_caller_is_named(tokenizer):
    with pytest.raises(ValueError, match="refuses this conversation"):
        render(tokenizer, [USER], chat_template="{% for %}")


def test_template_is_found_among_several(tmp_path):
    save_byte_level_tokenizer(tmp_path)
    for path in tmp_path.glob("chat_template*"):
        path.unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | length }} {{ messages[0].content }}"},
        {"name": "loud", "template": "{{ messages[0].content }}!"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    assert render(tokenizer, [USER]) == "dog"
    assert render(tokenizer, [USER], tools=[{"type": "function"}]) == "1 dog"
    assert render(tokenizer, [USER], chat_template="loud") == "dog!"
