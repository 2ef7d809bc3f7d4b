"""Serving: an engine with continuous batching, paged keys and values and a prefix cache, behind an HTTP interface."""
