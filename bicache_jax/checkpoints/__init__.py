"""Checkpoints as they are stored: safetensors and orbax folders, their fields, tokenizers and fingerprints."""
