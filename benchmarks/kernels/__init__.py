"""The tilings of kernels, timed against their memory bounds, for whoever changes the kernels."""
