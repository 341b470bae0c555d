"""Conversations of two messages."""

ASK, ANSWER = {"role": "user", "content": "How deep?"}, {"role": "assistant", "content": "Very."}
PLAIN = [ASK, ANSWER]
