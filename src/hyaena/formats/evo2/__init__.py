"""StripedHyena 2, as Evo 2's authors publish it: the configuration keys and the tensors of its checkpoints.

``config`` needs no torch; ``tensors`` does. Modules are named as in StripedHyena 1 (``formats.stripedhyena.modules``).
"""
