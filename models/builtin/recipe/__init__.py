"""The recipe of the built-in model: its text, tokenizer, training and evaluation."""
