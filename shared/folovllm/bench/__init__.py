"""Drives one engine with one workload, and turns what happened into a report."""
