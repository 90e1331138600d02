"""How programs use an engine: prompts in, texts out."""
