"""Fused operations of the transformer and of sampling: Triton, and the same in plain torch."""
