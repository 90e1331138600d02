"""What the command line prints for people: streamed text, tables of tokens, statistics."""

from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import TextIO

from ..entrypoints.output_stream import OutputStream
from ..entrypoints.outputs import CompletionOutput, RequestOutput


def print_stream(stream: OutputStream, out: TextIO) -> RequestOutput | None:
    """Print the first completion's text as it grows; returns the last output.

    An interrupt closes the stream, which aborts the request, and ends the output early.
    """
    last = None
    num_printed = 0
    try:
        with closing(stream):
            for last in stream:
                text = last.outputs[0].text
                out.write(text[num_printed:])
                out.flush()
                num_printed = len(text)
    except KeyboardInterrupt:
        out.write(" [interrupted]")
    out.write("\n")
    out.flush()
    return last


def print_outputs(outputs: Sequence[RequestOutput], out: TextIO) -> None:
    """Print all completions, each under a heading if there is more than one."""
    is_alone = sum(len(output.outputs) for output in outputs) == 1
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            if not is_alone:
                name = f"prompt {number}"
                if len(output.outputs) > 1:
                    name += f", completion {completion.index + 1}"
                print(f"--- {name} ({completion.finish_reason})", file=out)
            print(completion.text, file=out)
            print_logprobs(completion, out)


def print_logprobs(completion: CompletionOutput, out: TextIO) -> None:
    """One line per token: its log-probability and rank, then the likeliest ones."""
    for token_id, position in zip(completion.token_ids, completion.logprobs or (), strict=False):
        chosen = position[token_id]
        likeliest = sorted(position.values(), key=lambda logprob: logprob.rank)
        others = "  ".join(f"{p.decoded_token!r} {p.logprob:.3f}" for p in likeliest)
        print(
            f"{chosen.decoded_token!r:>16} {chosen.logprob:8.3f}  rank {chosen.rank:<4} {others}",
            file=out,
        )


def statistics_line(outputs: Sequence[RequestOutput], duration_s: float) -> str:
    """Tokens, output tokens per second and time to first token (median) of what was run."""
    num_input_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    num_output_tokens = sum(len(completion.token_ids) for completion in completions)
    times = [t for output in outputs if (t := output.metrics.ttft_s) is not None]
    reasons = sorted({completion.finish_reason or "interrupted" for completion in completions})
    return (
        f"[{num_input_tokens} input and {num_output_tokens} output tokens in {duration_s:.2f} s: "
        f"{num_output_tokens / duration_s:.1f} output tok/s, "
        f"TTFT {f'{median(times):.3f} s' if times else 'none'}; finish: {', '.join(reasons)}]"
    )
