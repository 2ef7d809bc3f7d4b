"""StripedHyena models as models of the transformers library.

Importing this package registers them with the Auto classes:

    import hyaena.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

They are the modules of ``hyaena.model``, called in another loop: there is one implementation of the mathematics, and
one set of weights, which ``from_native`` and ``to_native`` share without a copy. Needs the extra ``hf``.
"""

from hyaena.hf.versions import check_versions

check_versions()

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hyaena.adapters import TARGETS as LORA_TARGETS  # noqa: E402
from hyaena.hf.cache import StripedHyenaCache  # noqa: E402
from hyaena.hf.chat import set_chat_template  # noqa: E402
from hyaena.hf.configuration import StripedHyenaConfig  # noqa: E402
from hyaena.hf.heads import (  # noqa: E402
    StripedHyenaForCausalLM,
    StripedHyenaForSequenceClassification,
    StripedHyenaForTokenClassification,
)
from hyaena.hf.load import fast_tokenizer, load  # noqa: E402
from hyaena.hf.modeling import StripedHyenaModel, StripedHyenaPreTrainedModel  # noqa: E402

__all__ = [
    "LORA_TARGETS",
    "StripedHyenaCache",
    "StripedHyenaConfig",
    "StripedHyenaForCausalLM",
    "StripedHyenaForSequenceClassification",
    "StripedHyenaForTokenClassification",
    "StripedHyenaModel",
    "StripedHyenaPreTrainedModel",
    "fast_tokenizer",
    "load",
    "set_chat_template",
]

AutoConfig.register(StripedHyenaConfig.model_type, StripedHyenaConfig, exist_ok=True)
AutoModel.register(StripedHyenaConfig, StripedHyenaModel, exist_ok=True)
AutoModelForCausalLM.register(StripedHyenaConfig, StripedHyenaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(StripedHyenaConfig, StripedHyenaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(StripedHyenaConfig, StripedHyenaForTokenClassification, exist_ok=True)
