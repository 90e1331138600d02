"""An inference engine in 25 lines: without a cache, then with one. Explained in ../00_primer.md."""

import time

import torch

from folovllm.model.loader import load_model
from folovllm.text.tokenizer import Tokenizer


def attention(q, k, v):
    """q: [queries, heads, dim], the last ones of the sequence; k, v: [positions, kv_heads, dim]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def next_token(model, token_ids, first_position, attend):
    """The likeliest token after `token_ids`, which stand at `first_position` and after."""
    positions = torch.arange(first_position, first_position + len(token_ids))
    hidden = model(torch.tensor(token_ids), positions, attend)
    return int(model.compute_logits(hidden[-1:]).argmax())


def generate_without_cache(model, token_ids, num_new_tokens):
    """Compute the whole text again for every token."""
    token_ids = list(token_ids)

    def attend(layer, q, k, v):
        return attention(q, k, v)

    for _ in range(num_new_tokens):
        token_ids.append(next_token(model, token_ids, 0, attend))
    return token_ids


def generate_with_cache(model, token_ids, num_new_tokens):
    """Keep keys and values of every layer; compute what has none yet."""
    token_ids, num_computed, cache = list(token_ids), 0, {}

    def attend(layer, q, k, v):
        if layer in cache:
            k, v = torch.cat((cache[layer][0], k)), torch.cat((cache[layer][1], v))
        cache[layer] = k, v
        return attention(q, k, v)

    for _ in range(num_new_tokens):
        new = token_ids[num_computed:]
        token_ids.append(next_token(model, new, num_computed, attend))
        num_computed += len(new)
    return token_ids


def main(num_new_tokens=64):
    model = load_model("models/SmolLM2-135M-Instruct", device="cpu")
    tokenizer = Tokenizer("models/SmolLM2-135M-Instruct")
    prompt = tokenizer.encode("The history of computing begins with")
    for generate in (generate_without_cache, generate_with_cache):
        with torch.inference_mode():
            generate(model, prompt, 2)  # warm-up
            start = time.perf_counter()
            token_ids = generate(model, prompt, num_new_tokens)
        seconds = time.perf_counter() - start
        print(f"{generate.__name__}: {num_new_tokens} tokens in {seconds:.2f} s")
        print(f"  {tokenizer.decode(token_ids[len(prompt) :])!r}")


if __name__ == "__main__":
    main()
