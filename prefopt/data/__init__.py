"""Rows, validation, the chat template, token ids and prompt trees."""
