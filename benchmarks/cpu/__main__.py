"""``python -m benchmarks.cpu``: see ``benchmarks.run``."""

import sys

from benchmarks.cpu import SUITE
from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main(SUITE))
