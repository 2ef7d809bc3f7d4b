"""``python -m benchmarks.evo2``: see ``benchmarks.run``."""

import sys

from benchmarks.evo2 import SUITE
from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main(SUITE))
