"""What the prompt of a conversation costs with every turn: all of it encoded, and in pieces.

    PYTHONPATH=.:shared python docs/dev/trials/conversation_tokens.py --output FILE.json \
        [--model DIR]

Conversations of README's words in the model's own template; every turn comes back with all before
it, as chats do. Processor time of `Tokenizer.apply_chat_template`, template and all, in
milliseconds: medians over conversations that take turns with each other, each with words of its
own.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.text.tokenizer import Tokenizer


class WholeTokenizer(Tokenizer):
    """Remembers nothing of a conversation."""

    _pieces = None  # type: ignore[assignment]


def make_turns(words: list[str], num_turns: int, num_words: int) -> list[list[dict[str, Any]]]:
    """The messages of each turn: all before it, and a question."""
    messages: list[dict[str, Any]] = []
    turns = []
    for number in range(2 * num_turns):
        text = " ".join(random.choices(words, k=num_words))
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
        if number % 2 == 0:
            turns.append(list(messages))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--words", type=int, default=50, help="of a question, and of an answer")
    parser.add_argument("--conversations", type=int, default=30)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    random.seed(0)
    words = Path("README.md").read_text(encoding="utf-8").split()
    ways = {"whole": WholeTokenizer(arguments.model), "pieces": Tokenizer(arguments.model)}
    spent: dict[tuple[int, str], list[float]] = {}
    lengths: dict[int, list[int]] = {}
    for _ in range(arguments.conversations):
        conversation = make_turns(words, arguments.turns, arguments.words)
        for number, messages in enumerate(conversation, 1):
            made = []
            for way, tokenizer in ways.items():
                begin_s = time.process_time()
                made.append(tokenizer.apply_chat_template(messages))
                spent.setdefault((number, way), []).append(time.process_time() - begin_s)
            assert made[0] == made[1]
            lengths.setdefault(number, []).append(len(made[0]))
    rows = [
        {
            "turn": number,
            "prompt_tokens": statistics.median(of_turn),
            **{f"{way}_ms": statistics.median(spent[number, way]) * 1e3 for way in ways},
        }
        for number, of_turn in lengths.items()
    ]
    for row in rows:
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if arguments.output is not None:
        about = {"model": arguments.model.name, "environment": describe_environment()}
        write_json_atomically(arguments.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
