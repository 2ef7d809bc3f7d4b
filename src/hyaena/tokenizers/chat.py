"""Chat templates: conversations as the texts that models were trained on."""

from __future__ import annotations

NOUS = """\
{{- bos_token or '' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- message.content + '\\n\\n' }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction:\\n' + message.content + '\\n\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\\n' }}
        {%- generation %}
            {{- message.content + (eos_token or '') }}
        {%- endgeneration %}
        {{- '' if loop.last and not add_generation_prompt else '\\n\\n' }}
    {%- else %}
        {{- raise_exception('the roles are user and assistant, and system for the first message') }}
    {%- endif %}
{%- endfor %}
{{- '### Response:\\n' if add_generation_prompt else '' }}
"""
"""The prompt format of StripedHyena-Nous-7B: ``### Instruction:\\n{prompt}\\n\\n### Response:\\n{response}``.

A Jinja template for ``apply_chat_template`` of transformers. A response ends with the end token, and further turns
follow after an empty line. A system message stands before the first instruction. The published format has one turn and
no system message; what is here beyond it is a convention of this package. ``generation`` marks what the assistant says,
so that a loss can count that alone (``return_assistant_tokens_mask``, TRL's ``assistant_only_loss``).
"""

TEMPLATES = {"nous": NOUS}
"""By name."""
