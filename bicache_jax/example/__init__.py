"""The bundled model's task and tokenizer."""
