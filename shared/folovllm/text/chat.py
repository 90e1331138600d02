"""Conversations, in the forms that vLLM takes, made ready for the chat template of a model."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..setting_checks import require_bool

Message = Mapping[str, Any]
"""One turn of a conversation, in OpenAI's form: `{"role": "user", "content": "Hello"}`.

"content" is a text or a list of text parts, `{"type": "text", "text": "Hello"}`. A turn of the
assistant may have "tool_calls", and no content then; one with the role "tool" answers one of them.
What else a message holds ("name", "tool_call_id", "reasoning_content", …) goes to the template.
"""

_FORMATS = ("auto", "string", "openai")
_OPTIONS = ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
"""What has a parameter of its own and so is no template variable."""
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Transformers' own tag, which marks what an assistant says and which plain Jinja does not know."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation becomes a prompt; names and meanings are those of vLLM's `LLM.chat`."""

    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own, or the name of one of several it has."""
    chat_template_content_format: str = "auto"
    """What a template gets as content: "string", one text (parts are joined by line ends);
    "openai", a list of parts; "auto" is the latter if the template loops over the content."""
    add_generation_prompt: bool = True
    """Open the assistant's turn behind the last message."""
    continue_final_message: bool = False
    """Leave the last message open, for the model to go on with it."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of functions that the model may call, in OpenAI's form."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Values of further variables of the template, like Qwen3's `enable_thinking`."""

    def __post_init__(self) -> None:
        require_bool("add_generation_prompt", self.add_generation_prompt)
        require_bool("continue_final_message", self.continue_final_message)
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "continue_final_message=True goes on with the last message, but "
                "add_generation_prompt=True opens a new one behind it; set one of them to False"
            )
        if self.chat_template_content_format not in _FORMATS:
            raise ValueError(
                f"chat_template_content_format must be one of {', '.join(_FORMATS)}, "
                f"got {self.chat_template_content_format!r}"
            )
        if not (self.chat_template is None or isinstance(self.chat_template, str)):
            raise ValueError(f"chat_template must be a text, got {self.chat_template!r}")
        tools = self.tools or ()
        if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
            raise ValueError(
                f'tools must be a list of schemas like {{"type": "function", "function": {{…}}}}, '
                f"got {self.tools!r}"
            )
        kwargs = {} if self.chat_template_kwargs is None else self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise ValueError(
                f"chat_template_kwargs must map names to values, like "
                f"{{'enable_thinking': False}}, got {self.chat_template_kwargs!r}"
            )
        for name in _OPTIONS:
            if name in kwargs:
                raise ValueError(
                    f"chat_template_kwargs sets {name!r}, which is no variable of a template's "
                    f"own; give it as an argument beside chat_template_kwargs"
                )


DEFAULT_OPTIONS = ChatOptions()


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template reads, found out without running it."""

    variables: frozenset[str]
    """Names that the caller may set."""
    loops_over_content: bool
    """Whether it takes content apart into its parts."""

    @staticmethod
    def of(template: str) -> "TemplateTraits":
        """jinja2.TemplateError if it is no template."""
        from jinja2 import Environment, meta

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        tree = environment.parse(_GENERATION_TAG.sub("", template))
        variables = frozenset(meta.find_undeclared_variables(tree))
        return TemplateTraits(variables, any(_content_loops(tree)))


def check_options(options: ChatOptions, traits: TemplateTraits, where: str) -> None:
    """ValueError for an option that this template would not look at.

    where: what the template belongs to, for the message.
    """
    if options.tools and "tools" not in traits.variables:
        raise ValueError(
            f"the chat template of {where} does not read tools, so the model would never see "
            f"them; describe them in a system message, or give a chat_template that reads them"
        )
    for name in options.chat_template_kwargs or ():
        if name not in traits.variables:
            raise ValueError(
                f"the chat template of {where} does not read {name!r} of chat_template_kwargs; "
                f"it reads {', '.join(sorted(traits.variables))}"
            )


def normalise_messages(messages: Sequence[Message], content_format: str) -> list[dict[str, Any]]:
    """Copies of the messages in the one form that a template understands.

    content_format: "string" or "openai", as in `ChatOptions`. Arguments of tool calls, which
    OpenAI writes as JSON texts, become the objects that templates expect.
    ValueError, naming the message, for what is no conversation and for parts that are no text.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            f"a conversation is a non-empty list of messages "
            f'like {{"role": "user", "content": "Hello"}}, got {messages!r}'
        )
    return [_normalise(message, index, content_format) for index, message in enumerate(messages)]


def _normalise(message: Message, index: int, content_format: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(
            f"message {index} needs a string under 'role', got {message!r}; "
            f'write it as {{"role": "user", "content": "Hello"}}'
        )
    normalised = {key: value for key, value in message.items() if value is not None}
    if normalised.get("tool_calls"):
        normalised["tool_calls"] = _parse_tool_calls(normalised["tool_calls"], index)
        normalised.setdefault("content", "")
    texts = _texts(normalised.get("content"), index)
    parts = [{"type": "text", "text": text} for text in texts]
    normalised["content"] = parts if content_format == "openai" else "\n".join(texts)
    return normalised


def _texts(content: object, index: int) -> list[str]:
    """The texts of a content, one per part."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"message {index} needs a string or a list of text parts under 'content', got "
            f'{content!r}; write it as {{"role": "user", "content": "Hello"}}'
        )
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise ValueError(
                f"part {number} of the 'content' of message {index} is of type {kind!r}; this "
                f'engine reads text alone: {{"type": "text", "text": "Hello"}}'
            )
        if not isinstance(text, str):
            raise ValueError(
                f"part {number} of the 'content' of message {index} needs a string under 'text', "
                f'got {part!r}; write it as {{"type": "text", "text": "Hello"}}'
            )
        texts.append(text)
    return texts


def _parse_tool_calls(tool_calls: object, index: int) -> list[dict[str, Any]]:
    parsed = []
    calls: Any = tool_calls if isinstance(tool_calls, list | tuple) else [tool_calls]
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"message {index} holds the tool call {call!r}; write it as "
                f'{{"type": "function", "function": {{"name": "add", "arguments": "{{}}"}}}}'
            )
        arguments: Any = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(
                    f"the arguments of a tool call in message {index} are no JSON ({error}): "
                    f"{arguments!r}"
                ) from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _content_loops(tree: Any) -> Iterator[bool]:
    """True for every loop over the content of a message, named directly or through a variable."""
    from jinja2 import nodes

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter) and node.node is not None:
            return is_content(node.node)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    names = {
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node)
    }
    for loop in tree.find_all(nodes.For):
        is_named = isinstance(loop.iter, nodes.Name) and loop.iter.name in names
        yield is_named or is_content(loop.iter)
