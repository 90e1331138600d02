"""Run every stage on one workload, check that they agree, and draw what the difference is."""
