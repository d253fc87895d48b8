"""Layers and kernels from outside the package, replaced without patching it.

A package registers from code, or through an entry point of the group `bailing_jax.plugins` that
names a function without arguments, which `load` calls once, at start-up:

    def register():
        plugins.register_layer("lightning_attention", MyAttention)
        plugins.register_kernel("lightning_decode", "mine", my_decode, supports=my_limits)

A layer class takes the place of one of LAYERS in every model of the process; see
docs/plugins.md for what it has to declare. A kernel joins the implementations of its operator, and
"auto" asks it first. Imports no jax: parameters are described where there is no device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bailing_jax.errors import UserError

GROUP = "bailing_jax.plugins"
# The layers that can be replaced, by the attention kind of the layer plan.
LAYERS = {
    "lightning_attention": "lightning",
    "gqa_attention": "gqa",
    "mla_attention": "mla",
}
# What a layer class must have, and how each is called.
_METHODS = {
    "parameters": ("config", "path"),
    "state_spec": ("config", "spec"),
}
_CONSTRUCTOR = ("self", "scope", "config", "options")
_CALL = ("self", "x", "state", "layout", "log_decay")


@dataclass
class _Registry:
    """Layer classes by attention kind, and a line about each thing that was replaced."""

    layers: dict[str, type] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    loaded: bool = False
    # Whose entry point is being called.
    origin: str = "this program"


_REGISTRY = _Registry()


def register_layer(name: str, layer: type) -> None:
    """Put a layer class in place of the built-in one of that name, in models built from now on.

    Args:
        name: one of LAYERS.
        layer: a `flax.nnx.Module` class with `parameters(config, path)` and
            `state_spec(config, spec)`, made with (scope, config, options) and called with
            (x, state, layout, log_decay).

    Raises:
        UserError: an unknown name, a name that is taken, or a class that lacks something.
    """
    if name not in LAYERS:
        raise _wrong(f"there is no layer {name!r} to replace", f"Layers: {', '.join(LAYERS)}")
    kind = LAYERS[name]
    if kind in _REGISTRY.layers:
        taken = _called(_REGISTRY.layers[kind])
        raise _wrong(f"{name} is already replaced, by {taken}", "Uninstall one of the two plugins.")
    if not inspect.isclass(layer):
        raise _wrong(f"{name}: {layer!r} is not a class", "Register the layer class itself.")
    for method, arguments in _METHODS.items():
        found = getattr(layer, method, None)
        if not callable(found):
            raise _wrong(
                f"{name}: {_called(layer)} has no {method}({', '.join(arguments)})",
                "It says which parameters or which state the layer has: docs/plugins.md",
            )
        _check_signature(f"{name}: {_called(layer)}.{method}", found, arguments)
    _check_signature(f"{name}: {_called(layer)}", layer.__init__, _CONSTRUCTOR)
    call = vars(layer).get("__call__") or getattr(layer, "__call__", None)  # noqa: B004
    if not inspect.isfunction(call):
        raise _wrong(
            f"{name}: {_called(layer)} can't be called",
            f"Give it __call__({', '.join(_CALL)}) -> (y, state).",
        )
    _check_signature(f"{name}: {_called(layer)}.__call__", call, _CALL)
    _REGISTRY.layers[kind] = layer
    _REGISTRY.replaced.append(f"{name} is {_called(layer)}, from {_REGISTRY.origin}")


def register_kernel(
    operator: str,
    name: str,
    run: Callable,
    supports: Callable[..., str | None] | None = None,
    exact: Callable | None = None,
) -> None:
    """Add a kernel to an operator; "auto" takes it wherever it supports the call.

    Args:
        operator: such as "lightning_decode".
        name: of the kernel, for `implementation=`.
        run: takes what the operator's other implementations take.
        supports: the call's arrays -> None, or the reason why it can't run; default: it always can.
        exact: its exact form, where it has one.

    Raises:
        UserError: an unknown operator, a name that is taken, or other arguments.
    """
    import pallas_kernels  # noqa: F401  (registers the operators)
    from pallas_kernels import dispatch

    names = dispatch.implementations(operator)
    if not names:
        known = ", ".join(dispatch.operators())
        raise _wrong(f"there is no operator {operator!r}", f"Operators: {known}")
    if name in names or name == "auto":
        raise _wrong(
            f"{operator} already has an implementation named {name!r}",
            f"Taken: auto, {', '.join(names)}",
        )
    wanted = dispatch.arguments(operator)
    for form in (run, exact):
        if form is not None:
            _check_signature(f"{operator}: kernel {name!r}", form, *wanted)
    if supports is None:
        supports = dispatch.always
    dispatch.register(operator, name, run, supports, exact, preferred=True)
    _REGISTRY.replaced.append(f"{operator} has kernel {name!r}, from {_REGISTRY.origin}")


def load() -> tuple[str, ...]:
    """Call every installed entry point, once a process; a line about each thing replaced.

    Raises:
        UserError: a plugin that can't be imported or registers something wrong.
    """
    if not _REGISTRY.loaded:
        # Slow to import, and not needed before a model is.
        from importlib.metadata import entry_points

        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            package = entry.dist.name + " " + entry.dist.version if entry.dist else entry.value
            _REGISTRY.origin = package
            try:
                _call(entry.load, entry.name)
            finally:
                _REGISTRY.origin = "this program"
        _REGISTRY.loaded = True
    return tuple(_REGISTRY.replaced)


def layer(kind: str) -> Any:
    """The class that replaces the built-in layer of an attention kind, or None."""
    return _REGISTRY.layers.get(kind)


def _call(import_it: Callable[[], Any], name: str) -> None:
    try:
        register = import_it()
        if not callable(register):
            raise _wrong(f"{register!r} can't be called", "Name a function without arguments.")
        register()
    except UserError as error:
        raise UserError(
            f"plugin {name!r} ({_REGISTRY.origin}): {error.message}", error.hint
        ) from None
    except Exception as error:
        raise UserError(
            f"plugin {name!r} ({_REGISTRY.origin}): {type(error).__name__}: {error}",
            "Mend the plugin, or uninstall it.",
        ) from error


def _check_signature(
    what: str, function: Callable, positional: Iterable[str], keywords: Iterable[str] = ()
) -> None:
    """Refuse a function that can't be called so."""
    positional, keywords = list(positional), list(keywords)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin or a compiled function does not tell
        return
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        star = ["*"] * bool(keywords)
        raise _wrong(
            f"{what} takes {signature}: {error}",
            f"It is called with ({', '.join([*positional, *star, *keywords])}).",
        ) from None


def _called(thing: type) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _wrong(message: str, hint: str) -> UserError:
    return UserError(message, hint)
