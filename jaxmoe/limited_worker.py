"""The process in which `jaxmoe.limited` evaluates what a checkpoint brings: chat templates and patterns.

It is started as a script. Every line of standard input is a request in JSON, every line of standard output its answer.
Its only argument is the number of seconds of processor time that a request may use; it may use one GiB of memory. The
system ends the process if it uses more. It cannot write files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
import time
from typing import Any

MEMORY_BYTES = 2**30
MAX_TEXT = 16 * 2**20  # characters of a rendered text


def main() -> None:
    """Answers requests until standard input ends."""
    seconds = int(sys.argv[1])
    _limit("RLIMIT_AS", MEMORY_BYTES)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CORE", 0)
    tasks = {"render": render, "first_match": first_match}
    for line in sys.stdin:
        # Processor time counts from the start of the process, so the limit moves with every request.
        _limit("RLIMIT_CPU", math.ceil(time.process_time()) + seconds)
        request = json.loads(line)
        try:
            answer = {"result": tasks[request.pop("task")](**request)}
        except MemoryError:
            answer = {"error": f"needs more than {MEMORY_BYTES >> 30} GiB of memory"}
        except RecursionError:
            answer = {"error": "is nested too deeply"}
        except Exception as error:
            answer = {"error": (str(error) or type(error).__name__)[:1000]}
        print(json.dumps(answer), flush=True)


def _limit(name: str, value: int) -> None:
    """Sets a soft limit of the system; systems without it have only the caller's limit of time."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def render(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The text of a Jinja template, and the character range of every `{% generation %}` block in it."""
    compiled, marks = _compiled(template)
    marks.pieces.clear()
    marks.spans.clear()
    length = 0
    for piece in compiled.generate(variables):
        length += len(piece)
        if length > MAX_TEXT:
            raise ValueError(f"renders more than {MAX_TEXT:,} characters")
        marks.pieces.append(piece)
    return {"text": "".join(marks.pieces), "generated": marks.spans}


class _Marks:
    """What has been rendered so far, and the ranges of the blocks that the assistant generates."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def block(self, caller: Any) -> str:
        text = caller()
        start = sum(map(len, self.pieces))
        self.spans.append((start, start + len(text)))
        return text


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[Any, _Marks]:
    """The template, compiled with the names that transformers gives to chat templates."""
    import datetime

    import jinja2.nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    marks = _Marks()

    class Generation(Extension):
        """The tag `{% generation %}` ... `{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_block")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _block(self, caller: Any) -> str:
            return marks.block(caller)

    class SafeNamespace(Namespace):
        """A namespace without names of Python's internals."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"cannot set the attribute {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def plain_dict(*values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own filter escapes HTML.
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": plain_dict,
        "namespace": SafeNamespace,
    }
    return environment.from_string(template), marks


def first_match(patterns: list[str], names: list[str]) -> int | None:
    """The index of the first pattern that matches the end of one of the names, from a dot on, as in PEFT."""
    for index, pattern in enumerate(patterns):
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError) as error:
            raise ValueError(f"expected a regular expression, found {pattern[:100]!r}: {error}") from None
        if any(compiled.match(name) for name in names):
            return index
    return None


if __name__ == "__main__":
    main()
