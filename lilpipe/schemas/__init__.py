"""Tables that stages exchange: documents, prompts, conversations, preferences; and the order of their rows."""
