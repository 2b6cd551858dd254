"""Vocabulary: configuration, requests and results, cache pytrees, attention's signature, suffix layout, numerics."""
