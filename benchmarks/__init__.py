"""What hyaena must reach, measured: ``python -m benchmarks.run``, or ``make bench``.

Each benchmark first checks that the two sides compute what they should, then runs them in turns, so that whatever
else the machine does meets both, and reports the median of the pairwise ratios with its spread.
"""
