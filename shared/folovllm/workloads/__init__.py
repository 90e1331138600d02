"""Lists of requests, made from a seed or read from a trace."""
