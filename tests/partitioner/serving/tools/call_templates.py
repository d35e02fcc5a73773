"""Chat templates that write calls of tools, in the forms that models in use have; and such as do not."""

from __future__ import annotations

_HEAD = """
{%- if tools %}{{ "<|system|>" }}
{%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor %}{{ "<|end|>\\n" }}{% endif -%}
"""
_TURNS = (
    _HEAD
    + """
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content if message.content else "" }}
{%- if message.tool_calls -%}
CALLS
{%- endif -%}
{{ "<|end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|assistant|>\nLEAD" }}{% endif -%}
"""
)


def turns(calls: str, lead: str = "") -> str:
    return _TURNS.replace("CALLS", calls).replace("LEAD", lead)


_MARKED = """
{%- for call in message.tool_calls -%}
{%- if not loop.first or message.content %}{{ "\n" }}{% endif -%}
{{ '<tool_call>\n{"name": "' }}{{ call.function.name }}{{ '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor -%}
"""
MARKED = turns(_MARKED)
THINKING = turns(_MARKED, "<think>\n")
BARE = turns("""
{%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif -%}
{%- set call = message.tool_calls[0].function -%}
{{ '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
""")
LISTED = turns("""
{{- "[CALLS] [" }}
{%- for call in message.tool_calls -%}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 letters") }}{% endif -%}
{{ '{"name": "' }}{{ call.function.name }}{{ '", "arguments": ' }}{{ call.function.arguments | tojson -}}
{{- ', "id": "' }}{{ call.id }}{{ '"}' }}{% if not loop.last %}{{ ", " }}{% endif %}
{%- endfor -%}
{{- "]" }}
""")
FENCED = turns("""
{{- "<calls>" }}
{%- for call in message.tool_calls -%}
{%- if not loop.first %}{{ "\n" }}{% endif -%}
{{ "<call>function<sep>" + call.function.name + "\n```json\n" + call.function.arguments + "\n```</call>" }}
{%- endfor -%}
{{- "</calls>" }}
""")
REVERSED = turns("""
{%- for call in message.tool_calls -%}
{{ '\n<tool_call>\n{ "arguments": ' }}{{ call.function.arguments | tojson -}}
{{- ', "name": "' }}{{ call.function.name }}{{ '"}\n</tool_call> ' }}
{%- endfor -%}
""")
SPACED = LISTED.replace(
    '{{ message.content if message.content else "" }}', "{{ ' ' + message.content if message.content else '' }}"
)
FORMS = {
    "marked": MARKED,
    "thinking": THINKING,
    "bare": BARE,
    "listed": LISTED,
    "fenced": FENCED,
    "reversed": REVERSED,
    "spaced": SPACED,
}
MARKS = ("<tool_call>", "</tool_call>", "[CALLS]", "<calls>", "</calls>", "<call>", "</call>", "<sep>", "<|end|>")

NO_FORM = {
    "does not tell the model of tools": MARKED.replace("if tools", "if false"),
    "writes no calls": turns(""),
    "arguments as JSON": turns("""
{%- for call in message.tool_calls -%}
<function={{ call.function.name }}>
{%- for key, value in call.function.arguments.items() %}<parameter={{ key }}>{{ value }}</parameter>{% endfor -%}
</function>
{%- endfor -%}
"""),
    "what the assistant has said": MARKED.replace("message.content if message.content", "'' if true"),
}
