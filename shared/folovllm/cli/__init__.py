"""The command line that every stage has: `generate`, `chat`, `bench`, `profile`."""
