"""Which implementation of an operator runs.

An implementation registers under (operator, name) with a `supports` function that returns None
or the reason why it can't run. "auto" takes the first of the platform's preferences that
supports the call; a named implementation runs or is refused, it never falls through. Every
choice is logged once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax

logger = logging.getLogger(__name__)

Supports = Callable[..., str | None]


@dataclass(frozen=True)
class Implementation:
    """A function with its operator's signature, and when it can run."""

    run: Callable
    supports: Supports


_REGISTRY: dict[str, dict[str, Implementation]] = {}
# Reference implementations are for comparison: "auto" never takes them.
_PREFERENCE = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("xla",)}


def always(*_args: object, **_kwargs: object) -> None:
    """The `supports` of an implementation without limits."""


def register(operator: str, name: str, run: Callable, supports: Supports = always) -> None:
    """Add an implementation.

    Raises:
        ValueError: the operator has one of that name.
    """
    names = _REGISTRY.setdefault(operator, {})
    if name in names:
        raise ValueError(f"{operator} already has an implementation named {name!r}")
    names[name] = Implementation(run, supports)


def implementations(operator: str) -> tuple[str, ...]:
    """The registered names, in order of registration."""
    return tuple(_REGISTRY.get(operator, {}))


def choose(operator: str, implementation: str, *args: object, **kwargs: object) -> Callable:
    """The function that runs `operator` for this call.

    Raises:
        ValueError: the named implementation does not exist or does not support the call, or
            "auto" finds none.
    """
    registered = _REGISTRY[operator]
    if implementation != "auto":
        if implementation not in registered:
            raise ValueError(
                f"{operator}: no implementation {implementation!r}; "
                f"there are: auto, {', '.join(registered)}"
            )
        reason = registered[implementation].supports(*args, **kwargs)
        if reason is not None:
            raise ValueError(f"{operator}: {implementation!r} can't run: {reason}")
        return registered[implementation].run
    platform = jax.default_backend()
    reasons = []
    for name in _PREFERENCE.get(platform, ("xla",)):
        if name not in registered:
            continue
        reason = registered[name].supports(*args, **kwargs)
        if reason is None:
            _log_choice(operator, name, platform, "; ".join(reasons))
            return registered[name].run
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"{operator}: nothing can run on {platform}: {'; '.join(reasons)}")


@functools.cache
def _log_choice(operator: str, name: str, platform: str, reasons: str) -> None:
    """One line a choice and reason; a warning when another was preferred and can't run."""
    if reasons:
        logger.warning("%s: %s on %s, because %s", operator, name, platform, reasons)
    else:
        logger.info("%s: %s on %s", operator, name, platform)
