"""StripedHyena 1, as its authors publish it: the configuration keys and the tensors of its checkpoints.

``config`` needs no torch; ``tensors`` does.
"""
