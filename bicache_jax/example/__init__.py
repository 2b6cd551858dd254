"""Task and tokenizer of the bundled model."""
