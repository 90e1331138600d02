"""Other engines behind the same `bench` command, so that one runner measures all."""
