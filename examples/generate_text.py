"""Load a model, continue a prompt, and look at how sure the model was.

    python examples/generate_text.py [MODEL]

MODEL is a bundled name, a folder or a hub id (cub, which comes with the package).
"""

import sys

import hyaena

source = sys.argv[1] if len(sys.argv) > 1 else "cub"
model, tokenizer = hyaena.load(source)  # on the CPU, in float32; device="cuda", dtype="bfloat16" for a GPU

prompt = "import os\nimport "
completion = hyaena.generate(model, tokenizer, prompt, max_new_tokens=24, logprobs=3)
print(prompt + completion.text)

# The default is greedy: every token is the most probable one. logprobs=3 reports the three best of each step.
for best in completion.top_logprobs[:5]:
    print("  ".join(f"{tokenizer.decode([token])!r} {logprob:.2f}" for token, logprob in best))
total = sum(completion.logprobs)
print(f"{len(completion.tokens)} tokens, ended by {completion.finish_reason}, log-probability {total:.2f}")
