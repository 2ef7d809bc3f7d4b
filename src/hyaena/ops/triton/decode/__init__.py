"""Fused kernels of a decoding step: products, attention, embedding, argmax, rotary positions and cache write."""
