"""Folders that transformers writes for the models of ``hyaena.hf``.

``config`` needs no torch; neither module needs transformers.
"""
