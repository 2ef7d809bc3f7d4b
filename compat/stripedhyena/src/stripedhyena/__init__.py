"""The API of the original ``stripedhyena`` package over hyaena: one set of weights, hyaena's operators.

    stripedhyena.model.StripedHyena          the model, with the original's parameter and module names
    stripedhyena.cache                       the two inference-parameter objects
    stripedhyena.generation.Generator        text generation
    stripedhyena.sample.sample               logits to tokens
    stripedhyena.tokenizer                   CharLevelTokenizer, HFAutoTokenizer
    stripedhyena.utils.dotdict               a dictionary with attributes

docs/evo.md of hyaena says what differs from the original.
"""

__version__ = "0.2.2+hyaena"
