"""Python's collector of cycles rests while a graph is captured, and runs again behind it."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch

from hyaena.decoding.capture import capture


@pytest.fixture
def graphs(monkeypatch):
    """Stand in for CUDA's capture: records the arguments, and whether cycles are collected in the body."""
    seen = []

    @contextmanager
    def captured(graph, **kwargs):
        seen.append((graph, kwargs, gc.isenabled()))
        yield

    monkeypatch.setattr(torch.cuda, "graph", captured)
    return seen


class Graph:
    def pool(self):
        return 7, 0


def test_no_collection_within(graphs):
    graph = object()
    assert gc.isenabled()
    with capture(graph, Graph()):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert graphs == [(graph, {"pool": (7, 0), "capture_error_mode": "thread_local"}, False)]


def test_error_within(graphs):
    with pytest.raises(ZeroDivisionError), capture(object(), None):
        raise ZeroDivisionError
    assert gc.isenabled()
    assert graphs[0][1]["pool"] is None


def test_collector_that_was_off_stays_off(graphs):
    gc.disable()
    try:
        with capture(object(), None):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
