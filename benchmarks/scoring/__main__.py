"""``python -m benchmarks.scoring``: see ``benchmarks.run``."""

import sys

from benchmarks.run import main
from benchmarks.scoring import SUITE

if __name__ == "__main__":
    sys.exit(main(SUITE))
