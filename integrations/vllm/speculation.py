"""Speculative decoding of one model, for ``test_tokens``: arguments are a family, its folder, and the scale of weights.

Prompts repeat a few random tokens, so that there always is a draft, and the model seldom goes on like that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from integrations.vllm import conftest  # noqa: F401, it sets the environment before vLLM is imported
from integrations.vllm.cases import engine, make, metric, own_tokens, random_prompts, tokens

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}

if __name__ == "__main__":
    family, folder, scale = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    model = make(family, scale)
    prompts = [row * 12 for row in random_prompts(model, [5, 6, 7])]
    with engine(folder, speculative_config=DRAFTS, enable_prefix_caching=False) as llm:
        found = {
            "equal": tokens(llm, prompts, 48)[0] == own_tokens(model, prompts, 48),
            "drafted": metric(llm, "spec_decode_num_draft_tokens"),
            "accepted": metric(llm, "spec_decode_num_accepted_tokens"),
        }
    print(json.dumps(found))
