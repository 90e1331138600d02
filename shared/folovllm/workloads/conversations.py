"""Conversations: every turn comes back with the whole conversation before it as its prompt."""

from collections.abc import Sequence

from . import traces
from .options import LenRange, WorkloadOptions
from .source import PromptEncoder, WorkloadRequest, WorkloadSource

_ANSWERS = ("yes", "no")
"""Two answers that end differently: what the template writes behind both is not the answer's."""


def multi_turn(options: WorkloadOptions, source: WorkloadSource) -> list[WorkloadRequest]:
    """All conversations begin at once; turn k + 1 is asked `think` seconds after answer k.

    Conversation after conversation, so that a head of the workload has all kinds of turns.
    """
    path = options.optional_path()
    if path is not None:
        return _from_file(options, source, path)
    num, turns = options.integer("conversations", 64), options.integer("turns", 8)
    system_len = options.integer("system", 256, low=0)
    question_range = options.len_range("question", LenRange(32, 128))
    output_range = options.len_range("output", LenRange(32, 128))
    think_s = options.seconds("think", 0.0)
    options.finish()
    rng = source.rng()
    system = source.random_tokens("system", system_len)
    requests: list[WorkloadRequest] = []
    for i in range(num):
        lens = [(question_range.draw(rng), output_range.draw(rng)) for _ in range(turns)]
        questions = [
            source.random_tokens(f"question {i} {turn}", question_len)
            for turn, (question_len, _) in enumerate(lens)
        ]
        questions[0] = system + questions[0]
        requests += _conversation(i, questions, [output_len for _, output_len in lens], think_s)
    return requests


def follow_up_tokens(tokenizer: PromptEncoder, first: str, question: str) -> tuple[int, ...]:
    """What a chat template puts behind an answer when the user asks `question` next.

    That is the end of the assistant's turn, the user's turn and the opening of the next answer:
    the tokens in which a conversation ends whatever was answered in it. ValueError without a
    template, or where it does not leave the prompt of the `first` question as it was.
    """
    asked = {"role": "user", "content": first}
    prompt = tokenizer.apply_chat_template([asked])
    one, other = (
        tokenizer.apply_chat_template(
            [asked, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        )
        for answer in _ANSWERS
    )
    num_same, num_tail = _num_equal(prompt, one), _num_equal(one[::-1], other[::-1])
    # The last token of a prompt may become one with the first of an answer when it is encoded.
    if num_same < len(prompt) - 1 or not 0 < num_tail < len(one) - num_same:
        raise ValueError(
            "the chat template of this tokenizer does not append to a conversation: with an answer "
            "and a second question it rewrites the first prompt, so no turn could follow the "
            "tokens of an actual answer; use a model with another template, or multi-turn "
            "without a file, which draws random tokens"
        )
    return tuple(one[-num_tail:])


def _from_file(
    options: WorkloadOptions, source: WorkloadSource, path: str
) -> list[WorkloadRequest]:
    """The first `turns` questions of each line of a file that has as many."""
    tokenizer = source.require_tokenizer("multi-turn")
    turns, num = options.integer("turns", 2), options.optional_integer("conversations")
    output_range = options.len_range("output", LenRange(32, 128))
    think_s = options.seconds("think", 0.0)
    options.finish()
    found = traces.read_turns(path)
    long_enough = [questions[:turns] for questions in found if len(questions) >= turns]
    num = len(long_enough) if num is None else num
    if num > len(long_enough) or not long_enough:
        raise ValueError(
            f"workload {options.spec!r}: {len(long_enough)} of the {len(found)} conversations of "
            f"{path} have {turns} turns; ask for fewer turns or conversations"
        )
    options.values |= {
        "num_conversations_in_file": len(found),
        "num_conversations_too_short": len(found) - len(long_enough),
        "num_after_head": (len(long_enough) - num) * turns,
    }
    rng = source.rng()
    requests: list[WorkloadRequest] = []
    for i, (first, *others) in enumerate(long_enough[:num]):
        questions = [
            tuple(tokenizer.apply_chat_template([{"role": "user", "content": first}])),
            *(follow_up_tokens(tokenizer, first, question) for question in others),
        ]
        output_lens = [output_range.draw(rng) for _ in questions]
        requests += _conversation(i, questions, output_lens, think_s)
    return requests


def _conversation(
    number: int, questions: Sequence[tuple[int, ...]], output_lens: Sequence[int], think_s: float
) -> list[WorkloadRequest]:
    """`questions`: the first whole prompt, then what each further turn adds to its history."""
    first, *others = zip(questions, output_lens, strict=True)
    turn_id = f"c{number}-turn{{}}".format
    requests = [WorkloadRequest(*first, 0.0, turn_id(1), group="turn 1")]
    for turn, (question, output_len) in enumerate(others, start=2):
        requests.append(
            WorkloadRequest(
                prompt_token_ids=question,
                output_len=output_len,
                arrival_s=round(think_s, 6),
                request_id=turn_id(turn),
                follows=requests[-1].request_id,
                history_len=requests[-1].num_tokens,
                group=f"turn {turn}",
            )
        )
    return requests


def _num_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(tokens, others, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))
