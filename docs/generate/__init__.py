"""Reference pages that are generated from the code at build time; `docs/hooks.py` adds them to the site."""
