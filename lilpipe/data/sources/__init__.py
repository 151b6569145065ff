"""Readers of raw sources in all formats, which yield documents and unreadable rows."""
