"""The page at GET /: an engine at work, for people who want to see what it does."""
