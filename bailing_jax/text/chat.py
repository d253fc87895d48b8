"""The chat template a checkpoint ships: messages in, prompt text or token ids out.

`load_chat_template(folder)` -> `ChatTemplate`: `render` gives the text, `encode` the ids in which
only the template, never a message, can write control tokens. Messages go to the template as
given; no template is written here. A template is a program from a download: `renderer.py` runs
it out of this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.text.renderer import TIME_LIMIT_S, Renderer, check_syntax

if TYPE_CHECKING:
    from bailing_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_BYTES = 1_000_000
MAX_CONFIG_BYTES = 16_000_000
MAX_DEPTH = 64

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# What a template may be given beside scalars: lists of JSON objects.
_LIST_ARGUMENTS = ("tools", "documents")
_RESERVED = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")
_PRIVATE_USE = range(0xE000, 0xF900)


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template in `folder`, or None when it has none.

    `chat_template.jinja` comes before `chat_template` in `tokenizer_config.json`.

    Raises:
        UserError: a file that is too large, not UTF-8, not JSON, or no valid template.
    """
    config_path, path = folder / _CONFIG_FILE, folder / _TEMPLATE_FILE
    config: Mapping[str, Any] = {}
    if config_path.is_file():
        try:
            config = json.loads(_read(config_path, MAX_CONFIG_BYTES))
        except (ValueError, RecursionError) as error:
            raise _broken(config_path, f"not JSON: {error}") from error
        if not isinstance(config, dict):
            raise _broken(config_path, "not a JSON object")
    if path.is_file():
        source = _read(path, MAX_TEMPLATE_BYTES)
    else:
        path, source = config_path, _template_in(config, config_path)
    return ChatTemplate(source, str(path), _special_tokens(config)) if source else None


class ChatTemplate:
    """One compiled template; `where` names its file in messages. Safe to share between threads."""

    def __init__(
        self,
        source: str,
        where: str,
        special_tokens: Mapping[str, str] | None = None,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        """Check the syntax of `source`; `special_tokens` are variables such as `bos_token`."""
        self.source = source
        self.where = where
        self._special_tokens = dict(special_tokens or {})
        check_syntax(source, where)
        self._renderer = Renderer(source, where, self._special_tokens, time_limit_s)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Raises:
            UserError: a message or argument that is not allowed, a template that fails or
                refuses the conversation, or one that exceeds its time, memory or output.
        """
        variables = self._variables(messages, add_generation_prompt, template_args)
        return self._renderer.render(variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The prompt's token ids; names of control tokens inside messages are plain text.

        Each such name is broken by a character found nowhere else before the template sees it,
        so that the names still whole in the rendered text are the template's own. Conversations
        without such names, that is nearly all, reach the template unchanged. A template that
        joins two pieces of a message could still build a name; we trust it not to.
        """
        variables = self._variables(messages, add_generation_prompt, template_args)
        used = {*self.source, *json.dumps(variables, ensure_ascii=False)}
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise _refused(
                "the messages use every private-use character from U+E000 to U+F8FF",
                "Remove some: one is needed to tell messages from the template.",
            )
        guarded = _map_strings(variables, lambda text: tokenizer.guard(text, mark))
        return tokenizer.encode_guarded(self._renderer.render(guarded), mark)

    def _variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        template_args: Mapping[str, object] | None,
    ) -> dict[str, Any]:
        """All a template sees of a request, as JSON would carry it."""
        args = dict(template_args or {})
        _check_args(args, (*_RESERVED, *self._special_tokens))
        variables = {
            # Templates test these for None, so they are defined even when not given.
            **dict.fromkeys(_LIST_ARGUMENTS),
            **args,
            "messages": _check_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _map_strings(json.loads(json.dumps(variables)), str)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"messages or template arguments are not JSON: {error}") from error


def _read(path: Path, limit: int) -> str:
    size = path.stat().st_size
    if size > limit:
        raise _broken(path, f"{size} bytes; allowed: up to {limit}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _broken(path, f"not UTF-8: {error}") from error


def _refused(what: str, hint: str = "", *, options: tuple[str, ...] = ()) -> UserError:
    return UserError(what, hint, EXIT_USAGE, options=options)


def _broken(path: Path, what: str) -> UserError:
    return _refused(f"{path}: {what}", "Copy the file again from the released checkpoint.")


def _template_in(config: Mapping[str, Any], path: Path) -> str:
    """The `chat_template` of tokenizer_config.json ("" when absent): a string or a named list."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        if "default" not in named:
            raise _broken(path, f"chat_template names {sorted(map(str, named))}; needed: 'default'")
        value = named["default"]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _broken(path, "chat_template must be a string or a list of {name, template}")
    if len(value.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise _broken(path, f"chat_template is longer than {MAX_TEMPLATE_BYTES} bytes")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: strings, or objects with a `content`."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts, if each has a known role and a text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise _refused("messages must be a list of at least one {role, content} object")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _refused(f"{where} must be an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _refused(f"{where}: role = {repr(role)[:40]}; allowed: {', '.join(ROLES)}")
        only_calls = role == "assistant" and content is None and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            raise _refused(
                f"{where}: content is {type(content).__name__}; it must be a string",
                "This family reads text only: join content parts into one string.",
            )
    return [dict(message) for message in messages]


def _check_args(args: Mapping[str, object], reserved: Sequence[str]) -> None:
    for name, value in args.items():
        if not isinstance(name, str) or not name.isidentifier() or name in reserved:
            raise _refused(
                f"chat_template_args: {name!r:.60} is not a name that can be set",
                f"Give another; not to be set: {', '.join(reserved)}",
                options=("chat_template_args",),
            )
        if name in _LIST_ARGUMENTS:
            objects = isinstance(value, list) and all(isinstance(v, Mapping) for v in value)
            good, allowed = value is None or objects, "a list of objects"
        else:
            good = value is None or isinstance(value, str | bool | int | float)
            allowed = "a string, a number, true, false, null"
        if not good:
            got = type(value).__name__
            raise _refused(
                f"chat_template_args: {name} is a {got}; allowed: {allowed}",
                options=("chat_template_args",),
            )


def _map_strings(value: Any, change: Callable[[str], str], room: int = MAX_DEPTH) -> Any:
    """A JSON value with every string in it, keys included, changed."""
    if room == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change, room - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change, room - 1) for item in value]
    return value
