"""From logits to tokens, by each request's own rules."""
