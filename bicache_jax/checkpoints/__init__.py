"""Stored checkpoints: safetensors and orbax folders, their fields, tokenizers and fingerprints."""
