"""Time the two loops of docs/learn/code/first_engine.py, token by token, on one thread.

    OMP_NUM_THREADS=1 PYTHONPATH=.:shared python docs/dev/trials/primer_engine.py

Writes docs/dev/data/primer_engine_cpu.json. Seconds of the processor are counted beside those of
the clock, since other programs may use the machine meanwhile.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from folovllm.hardware import describe_environment
from folovllm.json_files import write_json_atomically
from folovllm.model.loader import load_model
from folovllm.text.tokenizer import Tokenizer

sys.path.insert(0, "docs/learn/code")
import first_engine

MODEL = "models/SmolLM2-135M-Instruct"
PROMPT = "The history of computing begins with"
OUTPUT = Path("docs/dev/data/primer_engine_cpu.json")
NUM_NEW_TOKENS, NUM_RUNS = 192, 3


def timed_run(generate, model, prompt):
    """Tokens, and per token the seconds of the clock and of the processor."""
    rows, original = [], first_engine.next_token

    def timed_next_token(*arguments):
        start, busy = time.perf_counter(), time.process_time()
        token_id = original(*arguments)
        rows.append((time.perf_counter() - start, time.process_time() - busy))
        return token_id

    first_engine.next_token = timed_next_token
    try:
        token_ids = generate(model, prompt, NUM_NEW_TOKENS)
    finally:
        first_engine.next_token = original
    return token_ids, rows


def main():
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, device="cpu"), Tokenizer(MODEL)
    prompt = tokenizer.encode(PROMPT)
    loops = (first_engine.generate_without_cache, first_engine.generate_with_cache)
    runs = {generate.__name__: [] for generate in loops}
    outputs = set()
    with torch.inference_mode():
        for generate in loops:
            generate(model, prompt, 2)
        for _ in range(NUM_RUNS):
            for generate in loops:
                token_ids, rows = timed_run(generate, model, prompt)
                outputs.add(tuple(token_ids))
                runs[generate.__name__].append(rows)
    if len(outputs) != 1:
        raise RuntimeError("the two loops do not give the same tokens")
    report = {
        "environment": describe_environment(),
        "model": MODEL,
        "dtype": "float32",
        "prompt": PROMPT,
        "num_prompt_tokens": len(prompt),
        "num_new_tokens": NUM_NEW_TOKENS,
        "text": tokenizer.decode(token_ids[len(prompt) :]),
        "loops": {name: summary(of_loop) for name, of_loop in runs.items()},
    }
    write_json_atomically(OUTPUT, report)
    for name, of_loop in report["loops"].items():
        print(name, of_loop["total_processor_s"], of_loop["total_clock_s"])


def summary(runs):
    """Medians over the runs, and totals of each run."""
    return {
        "total_clock_s": [round(sum(clock for clock, _ in rows), 3) for rows in runs],
        "total_processor_s": [round(sum(busy for _, busy in rows), 3) for rows in runs],
        "processor_s_by_token": [
            round(statistics.median(busy for _, busy in of_token), 5)
            for of_token in zip(*runs, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
