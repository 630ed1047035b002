"""The Jinja environment that chat templates run in: transformers' dialect, sandboxed and bounded.

Templates come with model files that somebody else wrote. They see plain JSON values only, cannot
reach Python's internals or change their inputs, and end at a deadline.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Longest text that one multiplication in a template may make.
_MAX_REPEATED_LEN = 1_000_000


class TemplateTimeoutError(TemplateError):
    """A template ran longer than it may."""


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """What transformers' `apply_chat_template` offers to templates, and a deadline for them.

    Every start of a loop and every call looks at the clock, so no template runs much longer than
    `time_limit_s` between two looks: `range` is limited by the sandbox, inputs by the caller.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, time_limit_s: float) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self._time_limit_s = time_limit_s
        self._thread = threading.local()
        self.filters["tojson"] = _to_json
        self.filters[_CHECK_TIME] = self._check_time
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    def run(self, template: Any, variables: Mapping[str, Any]) -> str:
        """Render one of this environment's templates in the calling thread."""
        self._thread.deadline = time.monotonic() + self._time_limit_s
        return str(template.render(variables))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _CHECK_TIME, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        __self._check_time(__context, None)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise SecurityError("exponent too large")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(sized, "__len__"):
                    if len(sized) * times > _MAX_REPEATED_LEN:
                        raise SecurityError("repetition too long")
        return super().call_binop(context, operator, left, right)

    @pass_context
    def _check_time(self, context: Context, value: Any) -> Any:
        """Takes a context so that Jinja does not fold it into a constant when compiling."""
        if time.monotonic() > self._thread.deadline:
            raise TemplateTimeoutError(f"took longer than {self._time_limit_s:g} s")
        return value


# Name of the filter that loops pass their iterable through.
_CHECK_TIME = "check_time"


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateDict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """`namespace(...)` that takes no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Jinja's own signature: a keyword may be called `self`.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
