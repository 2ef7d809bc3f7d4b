"""The file by which transformers finds the classes of a saved model where nobody has imported ``hyaena.hf``.

``trust_remote_code=True`` runs it. It holds no model: where hyaena is not installed, transformers says so.
"""

FILE = "modeling_hyaena.py"

CODE = '''"""Where transformers finds this model's classes: in the package hyaena, which must be installed."""

from hyaena.hf import (
    StripedHyenaConfig,
    StripedHyenaForCausalLM,
    StripedHyenaForSequenceClassification,
    StripedHyenaForTokenClassification,
    StripedHyenaModel,
)
'''

AUTO_MAP = {
    auto: f"{FILE.removesuffix('.py')}.{name}"
    for auto, name in {
        "AutoConfig": "StripedHyenaConfig",
        "AutoModel": "StripedHyenaModel",
        "AutoModelForCausalLM": "StripedHyenaForCausalLM",
        "AutoModelForSequenceClassification": "StripedHyenaForSequenceClassification",
        "AutoModelForTokenClassification": "StripedHyenaForTokenClassification",
    }.items()
}
"""The key ``auto_map`` of a configuration: Auto class -> file and class."""
