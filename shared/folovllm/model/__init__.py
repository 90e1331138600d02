"""Models: configuration, one transformer for all supported families, weights."""
