"""The API of the original ``vortex`` package (distribution ``vtx``) over hyaena.

    vortex.model.model.StripedHyena                 the model, with the original's parameter and module names
    vortex.model.cache                              the inference-parameter objects
    vortex.model.generation.{generate,Generator}    text generation
    vortex.model.sample.sample                      logits to tokens
    vortex.model.tokenizer.CharLevelTokenizer       bytes as ids
    vortex.model.utils                              load_checkpoint, dotdict, print_rank_0

Importing it completes evo2 in three places, see ``vortex._evo2``. docs/vortex.md of hyaena says what differs from the
original.
"""

from vortex import _evo2

__version__ = "1.1.0+hyaena"

_evo2.install()
