"""``python -m lilpipe.cli``: the command ``lilpipe``."""

from lilpipe.cli import main

if __name__ == "__main__":
    main()
