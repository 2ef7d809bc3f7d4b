"""``python -m hyaena``: the same as the ``hyaena`` command."""

import sys

from hyaena.cli import main

if __name__ == "__main__":
    sys.exit(main())
