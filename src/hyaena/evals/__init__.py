"""lm-evaluation-harness on the native engine: ``hyaena eval``, and ``evaluate`` for programs (extra ``eval``)."""

from hyaena.evals.run import evaluate
from hyaena.evals.suites import SUITES, Reference

__all__ = ["SUITES", "Reference", "evaluate"]
