"""Show text as it is generated, and end it at a string or at a token.

python examples/stream_with_stop.py
"""

import hyaena

model, tokenizer = hyaena.load("cub")
prompt = "class Stack:\n    def push(self, item):\n        "

# An event is one token. Its text holds whole characters only, and never a part of the stop string: text that might
# still become the stop string is held back until it is decided.
print(prompt, end="")
last = None
for event in hyaena.stream(model, tokenizer, prompt, max_new_tokens=80, stop=["\n\n"], temperature=0.7, seed=2):
    print(event.text, end="", flush=True)
    last = event
assert last is not None and last.stats is not None
print(f"\n-- ended by {last.finish_reason} after {last.stats.completion_tokens} tokens")

# A token ends a row as well. Here it is the newline, which stays in the list of tokens.
newline = tokenizer.encode("\n")[-1]
line = hyaena.generate(model, tokenizer, prompt, max_new_tokens=60, stop_token_ids=[newline])
print(prompt + line.text)
assert line.finish_reason == "length" or line.tokens[-1] == newline
