"""Templates that attack: nothing escapes the sandbox, and no work outlives its bounds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bailing_jax.errors import UserError
from bailing_jax.text import renderer
from bailing_jax.text.chat import ChatTemplate

USER = [{"role": "user", "content": "hello"}]


def template_of(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, "t.jinja", **options)


PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ lipsum['__glo' ~ 'bals__'] .os }}",
    "{{ joiner.__init__['__globals__'].os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__.sys.modules.os.system('touch CANARY') }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__.os }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') ~ '' ~ ''.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ range.__class__.__mro__ }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'CANARY' %}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config }}{{ request.application.__globals__ }}",
    "{% set x = cycler.__init__ %}{{ x.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ range(10 ** 9) }}",
    "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
]


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "touched"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_escapes_from_the_sandbox_are_refused(payload: str, canary: Path) -> None:
    # The function that the child runs, without the cost of a child for each payload.
    source = payload.replace("CANARY", str(canary))
    request = json.dumps({"messages": USER}).encode()
    answer = renderer._answer(lambda: renderer._environment().from_string(source), {}, request)
    # Some are refused without an error: the sandbox makes what they reach for undefined.
    assert "error" in answer or answer["text"] in ("", "[Undefined]"), answer
    assert not canary.exists()


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 'a' * 10 ** 15 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ (7 ** (10 ** 8)) % 10 }}",
    "{% set n = namespace(x='aaaa') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set x = 'a' * 1000 %}{{ x.replace('a', x).replace('a', x) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'.center(10 ** 9) }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ lipsum(n=10 ** 8) }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ range(99999) | batch(10 ** 9, 0) | list }}",
    "{{ 'a\\n' * 100000 | int }}{{ ('a\\n' * 100000) | indent(10000) }}",
    "{{ raise_exception('a' * 10 ** 9) }}",
    "{% filter upper %}{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxx"
    "{% endfor %}{% endfor %}{% endfilter %}",
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_stopped(bomb: str) -> None:
    bombed = template_of(bomb, time_limit_s=0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^t\.jinja"):
        bombed.render(USER)
    assert time.monotonic() - start < 2


def test_deep_templates_are_user_errors() -> None:
    with pytest.raises(UserError, match="nests too deep"):
        template_of("{{" + "(" * 50_000)
    with pytest.raises(UserError, match="nested"):
        template_of("{% for a in b %}" * 50 + "{% endfor %}" * 50).render(USER)


def test_output_up_to_the_bound_is_rendered() -> None:
    bounded = template_of("{{ 'a' * n }}")
    assert len(bounded.render(USER, template_args={"n": 4_000_000})) == 4_000_000
    with pytest.raises(UserError, match="longer than 4000000 characters"):
        bounded.render(USER, template_args={"n": 4_000_001})
