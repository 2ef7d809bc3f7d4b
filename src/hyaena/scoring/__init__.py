"""Reading without writing: scores of tokens and of variants, embeddings of layers, continuations.

One loop (``reader``) reads texts: short ones packed, long ones layer by layer. Hooks on modules (``places``)
collect what is kept of a pass: ``token_scores`` from the final norm, ``pooling`` from any module. ``continuations``
and ``edits`` read what texts have in common once, and go on from copies of the cache.
"""

from hyaena.scoring.api import ReadOptions, embed, embed_steps, iter_embeddings, iter_scores, score, score_steps
from hyaena.scoring.continuations import Continuation, score_continuations
from hyaena.scoring.edits import Edit, EditScore, iter_edit_scores
from hyaena.scoring.places import find_place
from hyaena.scoring.records import Encoder, Excerpt, NonFiniteRecordError, RecordError
from hyaena.scoring.strands import reverse_complement
from hyaena.scoring.token_scores import Score, Wanted, token_statistics
from hyaena.scoring.variants import iter_variant_scores, score_variants

__all__ = [
    "Continuation",
    "Edit",
    "EditScore",
    "Encoder",
    "Excerpt",
    "NonFiniteRecordError",
    "ReadOptions",
    "RecordError",
    "Score",
    "Wanted",
    "embed",
    "embed_steps",
    "find_place",
    "iter_edit_scores",
    "iter_embeddings",
    "iter_scores",
    "iter_variant_scores",
    "reverse_complement",
    "score",
    "score_continuations",
    "score_steps",
    "score_variants",
    "token_statistics",
]
