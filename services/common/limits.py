"""Limits that one service promises and another keeps."""

# Stop strings of one request, and their characters in all. A chat template may add its own
# on top, so the tokenizer takes twice as much as the gateway.
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 2048
