"""How fast hyaena is, and how much memory it takes, each against a baseline or a bound measured in the same run.

    python -m benchmarks.cpu       or ``make bench``: results/cpu.md
    python -m benchmarks.gpu       one GPU, at most eight minutes: results/gpu.md
    python -m benchmarks.kernels.hyena, …kernels.decode       the tilings of kernels, for whoever changes them

Clocks, rates, machine facts and tables come from ``hyaena.bench``; tests show what is correct. See README.md.
"""
