"""``python -m benchmarks.gpu``: see ``benchmarks.run``."""

import sys

from benchmarks.gpu import SUITE
from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main(SUITE))
