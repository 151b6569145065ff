"""Schemas of the tables that stages exchange (documents, prompts, conversations, preferences) and the row order."""
