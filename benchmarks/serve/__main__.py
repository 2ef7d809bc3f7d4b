"""``python -m benchmarks.serve``: see ``benchmarks.run``."""

import sys

from benchmarks.run import main
from benchmarks.serve import SUITE

if __name__ == "__main__":
    sys.exit(main(SUITE))
