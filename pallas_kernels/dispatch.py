"""Which implementation of an operator runs.

An implementation registers under (operator, name) with a `supports` function that returns None
or the reason why it can't run. "auto" takes the first that supports the call, of those a plugin
prefers and then of the platform's; a named implementation runs or is refused, it never falls
through. Every choice is logged once.

An implementation may have an exact form: in a call of given static sizes a row's bits, and those
of its state, depend on that row's own sequence alone, not on neighbours, on its place among the
rows, on slot or page numbers, nor on how long other sequences are. `exact` asks for that form.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

from pallas_kernels import compat

logger = logging.getLogger(__name__)

Supports = Callable[..., str | None]


@dataclass(frozen=True)
class Implementation:
    """A function with its operator's signature, its exact form if any, and when it can run.

    `preferred`: "auto" asks it before those of the platform.
    """

    run: Callable
    supports: Supports
    exact: Callable | None = None
    preferred: bool = False


_REGISTRY: dict[str, dict[str, Implementation]] = {}
# Reference implementations are for comparison: "auto" never takes them.
_PREFERENCE = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("xla",)}


def always(*_args: object, **_kwargs: object) -> None:
    """The `supports` of an implementation without limits."""


def lazily(module: str, function: str) -> Callable:
    """A function of a module that is imported by its first call.

    Kernels for one kind of device bring its part of Pallas, which other starts do without.
    """

    def call(*args: object, **kwargs: object) -> object:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def register(
    operator: str,
    name: str,
    run: Callable,
    supports: Supports = always,
    exact: Callable | None = None,
    *,
    preferred: bool = False,
) -> None:
    """Add an implementation.

    Raises:
        ValueError: the operator has one of that name.
    """
    names = _REGISTRY.setdefault(operator, {})
    if name in names:
        raise ValueError(f"{operator} already has an implementation named {name!r}")
    names[name] = Implementation(run, supports, exact, preferred)


def operators() -> tuple[str, ...]:
    """Names of the operators."""
    return tuple(_REGISTRY)


def arguments(operator: str) -> tuple[list[str], list[str]]:
    """What an operator's implementations are called with: positional names and keywords.

    Read off the portable form, which every operator has.
    """
    parameters = inspect.signature(_REGISTRY[operator]["xla"].run).parameters.values()
    needed = [p for p in parameters if p.default is p.empty]
    keywords = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    return [p.name for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD], keywords


def implementations(operator: str, *, exact: bool = False) -> tuple[str, ...]:
    """The registered names, in order of registration; `exact`: those with an exact form."""
    registered = _REGISTRY.get(operator, {})
    return tuple(name for name, found in registered.items() if found.exact or not exact)


def choose(
    operator: str, implementation: str, *args: object, exact: bool = False, **kwargs: object
) -> Callable:
    """The function that runs `operator` for this call: its exact form if that is asked for.

    Raises:
        ValueError: the named implementation does not exist, has no exact form or does not
            support the call, or "auto" finds none.
    """
    registered = _REGISTRY[operator]
    if implementation != "auto":
        if implementation not in registered:
            raise ValueError(
                f"{operator}: no implementation {implementation!r}; "
                f"there are: auto, {', '.join(registered)}"
            )
        reason = _reason(registered[implementation], exact, *args, **kwargs)
        if reason is not None:
            raise ValueError(f"{operator}: {implementation!r} can't run: {reason}")
        return _form(registered[implementation], exact)
    platform = compat.target_platform()
    reasons = []
    first = [name for name, found in registered.items() if found.preferred]
    for name in (*first, *_PREFERENCE.get(platform, ("xla",))):
        if name not in registered:
            continue
        reason = _reason(registered[name], exact, *args, **kwargs)
        if reason is None:
            _log_choice(operator, name, platform, "; ".join(reasons))
            return _form(registered[name], exact)
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"{operator}: nothing can run on {platform}: {'; '.join(reasons)}")


def _reason(found: Implementation, exact: bool, *args: object, **kwargs: object) -> str | None:
    """Why it can't run this call, or None."""
    if exact and found.exact is None:
        return "it has no exact form"
    return found.supports(*args, **kwargs)


def _form(found: Implementation, exact: bool) -> Callable:
    return found.exact if exact and found.exact is not None else found.run


@functools.cache
def _log_choice(operator: str, name: str, platform: str, reasons: str) -> None:
    """One line a choice and reason; a warning when another was preferred and can't run."""
    if reasons:
        logger.warning("%s: %s on %s, because %s", operator, name, platform, reasons)
    else:
        logger.info("%s: %s on %s", operator, name, platform)
