"""Fused kernels of the Hyena operator (forward, backward, step), their launchers and their custom ops."""
