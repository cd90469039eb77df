"""Choose a chat template: the tokenizer's own, one of a few built-in ones, or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.logs import get_logger
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

BUILT_IN_TEMPLATES = {
    "chatml": (
        "{%- if tools -%}"
        "{{ '<|im_start|>system\n' }}"
        "{{ messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' }}"
        "{{ 'These functions can be called:\n<tools>' }}"
        "{%- for tool in tools -%}{{ '\n' + tool | tojson }}{%- endfor -%}"
        '{{ \'\n</tools>\nA call is written as\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\' }}'
        "{{ '<|im_end|>\n' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if not (tools and loop.first and message['role'] == 'system') -%}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{%- for call in message['tool_calls'] or [] -%}"
        "{%- set arguments = call['function']['arguments'] -%}"
        "{{ '\n' if message['content'] or not loop.first else '' }}"
        "{{ '<tool_call>\n{\"name\": ' + call['function']['name'] | tojson + ', \"arguments\": ' }}"
        "{{ arguments if arguments is string else arguments | tojson }}"
        "{{ '}\n</tool_call>' }}"
        "{%- endfor -%}"
        "{{ '<|im_end|>\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
    ),
    # There is no role for the system: what it says opens the first turn of the user.
    "gemma": (
        "{{- bos_token -}}"
        "{%- set said = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        "{%- set said.system = said.system + message['content'] | trim + '\n\n' -%}"
        "{%- else -%}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
        "{{ said.system + message['content'] | trim + '<end_of_turn>\n' }}"
        "{%- set said.system = '' -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    ),
    "alpaca": (
        "{{- bos_token -}}"
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
    ),
}
"""Templates by name. ``chatml`` takes tools and their calls; the others do not, and refuse a row with some."""

_END_MARKS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of every template, which are not the user's to set."""


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, choice: str | None, variables: Mapping[str, Any] | None = None
) -> None:
    """Give ``tokenizer`` the template chosen: a built-in name, a jinja file, or with None its own.

    A tokenizer without one gets ``chatml``, and a line says so. The template travels with the export.

    Args:
        variables: values that the template is rendered with. They are written into it as defaults, so that whoever
            loads the tokenizer renders as training did, and may still pass another value.

    Raises:
        UserError: the file cannot be read, or the template has no such variable.
    """
    if choice is None:
        if tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template: chatml is used (dataset.chat_template chooses another)")
            tokenizer.chat_template = _built_in("chatml", tokenizer)
    elif choice in BUILT_IN_TEMPLATES:
        tokenizer.chat_template = _built_in(choice, tokenizer)
    else:
        tokenizer.chat_template = _read_template(Path(choice).expanduser())
    if variables:
        chosen = tokenizer.chat_template
        tokenizer.chat_template = (
            {name: _with_defaults(each, variables, tokenizer) for name, each in chosen.items()}
            if isinstance(chosen, dict)
            else _with_defaults(chosen, variables, tokenizer)
        )


def _with_defaults(template: str, variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Write ``variables`` into ``template`` as the values of what its caller does not define."""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in sorted(variables.items())
    )
    if template.startswith(defaults):
        return template
    found = _variables(template)
    if found is not None:
        read, written = found
        read -= {*_GIVEN, *tokenizer.special_tokens_map}
        unknown = [name for name in variables if name not in read]
        if unknown:
            there_are = ", ".join(sorted(read - written)) or "none"
            raise UserError(
                *(
                    f"dataset.chat_template_kwargs.{name}: the chat template has no such variable; it has: {there_are}"
                    for name in unknown
                )
            )
    return defaults + template


def _variables(template: str) -> tuple[set[str], set[str]] | None:
    """Return the variables that a template may read before it sets them, and those it sets; None: it is not valid."""
    from jinja2 import TemplateError, meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        parsed = _compile_jinja_template(template).environment.parse(template)
    except TemplateError:
        return None  # reported with its line when the first row is rendered
    written = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    return set(meta.find_undeclared_variables(parsed)), written


def _literal(value: Any) -> str:
    """Return ``value`` as jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a built-in template whose turns end with a token that this tokenizer has.

    Spelt out in ordinary tokens, an end mark would be learnt as text, and generation would not stop at it.
    """
    template = BUILT_IN_TEMPLATES[name]
    if tokenizer.eos_token is None:
        return template
    for mark in _END_MARKS:
        if mark not in tokenizer.get_vocab():
            template = template.replace(mark, tokenizer.eos_token)
    return template


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        built_in = ", ".join(BUILT_IN_TEMPLATES)
        raise UserError(
            f"dataset.chat_template={path} cannot be read ({reason}); give a jinja file, or a built-in name: {built_in}"
        ) from error
