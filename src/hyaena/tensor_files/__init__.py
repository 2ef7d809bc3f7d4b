"""Tensors as weights files describe them, and files of ``torch.save`` read without running what they name."""
