"""A prompt template as a chat template, by which transformers and vLLM write the prompt that a model is trained on."""

from __future__ import annotations

import re

from megatron_orz.data.prompts import resolve_template

_RULE = "this model is trained on one user message, and answers it; send that message alone"
_PLACEHOLDERS = {"{bos_token}": "{{- bos_token or '' -}}", "{problem}": "{{- messages[0]['content'] -}}"}


def chat_template(template: str) -> str:
    """The Jinja text that renders a conversation of one user message as `prompts.render` renders it as a problem.

    template: a built-in name, or a text that holds `{problem}`. The prompt ends where the response begins, whether a
    generation prompt is asked for or not; an assistant message that follows is the response, and ends in the eos token.
    Any other conversation is an error: no prompt of the training looks like it.
    """
    parts = re.split(r"(\{bos_token\}|\{problem\})", resolve_template(template))
    return "".join(
        [
            "{%- set roles = messages | map(attribute='role') | list -%}",
            "{%- if roles != ['user'] and roles != ['user', 'assistant'] -%}",
            f"{{{{- raise_exception({_literal(_RULE)}) -}}}}",
            "{%- endif -%}",
            *(_PLACEHOLDERS.get(part, f"{{{{- {_literal(part)} -}}}}") for part in parts if part),
            "{%- if roles | length == 2 -%}{{- messages[1]['content'] -}}{{- eos_token or '' -}}{%- endif -%}\n",
        ]
    )


def _literal(text: str) -> str:
    """The text as a string of Jinja, which knows the escapes of Python; in ASCII, and without a line break."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
