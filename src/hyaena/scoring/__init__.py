"""Reading without writing: scores of tokens, embeddings of layers, log-probabilities of continuations.

One loop (``reader``) reads texts: short ones packed, long ones layer by layer. Hooks on modules (``places``)
collect what is kept of a pass: ``token_scores`` from the final norm, ``pooling`` from any module.
"""

from hyaena.scoring.api import ReadOptions, embed, embed_steps, iter_embeddings, iter_scores, score, score_steps
from hyaena.scoring.continuations import Continuation, score_continuations
from hyaena.scoring.places import find_place
from hyaena.scoring.records import Encoder, NonFiniteRecordError, RecordError
from hyaena.scoring.strands import reverse_complement
from hyaena.scoring.token_scores import Score, Wanted, token_statistics

__all__ = [
    "Continuation",
    "Encoder",
    "NonFiniteRecordError",
    "ReadOptions",
    "RecordError",
    "Score",
    "Wanted",
    "embed",
    "embed_steps",
    "find_place",
    "iter_embeddings",
    "iter_scores",
    "reverse_complement",
    "score",
    "score_continuations",
    "score_steps",
    "token_statistics",
]
