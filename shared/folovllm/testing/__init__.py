"""Toy models, engine contract tests, invariants and fuzz, for the tests of every stage."""
