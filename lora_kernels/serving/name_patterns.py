"""The names and patterns of an adapter_config.json, held against module names as PEFT does.

Patterns are regular expressions out of a stranger's file: those that may take exponential time are refused, and all of them together get
MAX_SECONDS.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._errors import LoraValueError, message

MAX_LENGTH = 50_000  # characters of a pattern: some name every module of a model
MAX_CLASSES = 100  # [...] in a pattern: one over all of Unicode takes 7 ms to compile
MAX_PATTERNS = 500
MAX_SECONDS = 3.0  # of the thread's own time, for the patterns of one config; a common one takes a microsecond
MAX_WORK = 100_000_000  # about as many steps for one pattern on one name: a second
REPEAT = 24  # ways to try a repetition: 5 of them on a name of 60 characters can stop at C(65, 5) = 24**5 places

_TOKEN = re.compile(
    r"(?P<open>\((?:\?(?:[:=!]|P<\w+>))?)|(?P<close>\))|(?P<bar>\|)|(?P<repeat>(?:[*+?]|\{\d*,?\d*\})\??)|(?P<back>\\[1-9])"
    r"|(?P<kind>\[\^?\]?(?:\\.|[^\]\\])*\]|\\\w|[.^$])|(?P<char>\\?.)",
    re.DOTALL,
)
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])+")


def ends(module: str) -> Iterator[str]:
    """The module's name, and what follows each of its dots."""
    while module:
        yield module
        module = module.partition(".")[2]


class Trials:
    """Compiles and tries the patterns of one config. Raises LoraValueError for a bad one, and when they took MAX_SECONDS in all."""

    def __init__(self) -> None:
        self._left = MAX_SECONDS

    def __call__(self, run: Callable, *args: object):
        start = time.thread_time()
        result = run(*args)
        self._left -= time.thread_time() - start
        if self._left < 0:
            raise bad("its patterns take too long to be tried", f"over {MAX_SECONDS:g} s", fix="name the modules in full")
        return result

    def compile(self, key: str, pattern: str, form: str = "PATTERN") -> re.Pattern:
        """The pattern `key` holds, in the place of PATTERN."""
        form = form.replace("PATTERN", pattern)
        small = len(pattern) <= MAX_LENGTH and pattern.count("[") <= MAX_CLASSES
        try:
            compiled = self(re.compile, form) if small else None
        except (re.error, OverflowError, RecursionError) as error:
            raise bad(f"{key} holds no valid pattern", short(pattern), "a regular expression") from error
        if compiled is None or self(_work, form) > MAX_WORK:
            raise bad(f"{key} holds a pattern too complex to be tried", short(pattern), "about 4 repetitions, none of a group")
        return compiled


@dataclass(frozen=True)
class Selection:
    """Which modules PEFT adapts: check_target_module_exists in peft.tuners.tuners_utils."""

    targets: frozenset[str] | re.Pattern | None  # None: all of them
    excluded: frozenset[str] | re.Pattern
    layers: frozenset[int]  # empty: all of them
    layer_index: tuple[re.Pattern, ...]  # tried in turn for a module's layer
    trials: Trials

    def __contains__(self, module: str) -> bool:
        if self._among(self.excluded, module) or not (self.targets is None or self._among(self.targets, module)):
            return False
        if not self.layers or module in self.targets:  # one named in full counts in any layer
            return True
        found = next(filter(None, (self.trials(p.match, module) for p in self.layer_index)), None)
        return found is not None and found["idx"] is not None and int(found["idx"]) in self.layers

    def _among(self, given: frozenset[str] | re.Pattern, module: str) -> bool:
        if isinstance(given, re.Pattern):
            return self.trials(given.fullmatch, module) is not None
        return any(end in given for end in ends(module))


class Overrides:
    """rank_pattern or alpha_pattern: the value of the first key that matches an end of the module's name, as PEFT's get_pattern_key has it.

    Some adapters have a key for each of thousands of modules: plain names are looked up, not tried. A dot in one is any character, as in
    every pattern, so they are kept by the places of their dots, which are few.
    """

    def __init__(self, key: str, values: dict, trials: Trials) -> None:
        self._values, self._trials = values, trials
        self._order = {pattern: i for i, pattern in enumerate(values)}
        self._plain: dict[tuple[str, str], str] = {}  # places of the dots, text -> pattern
        self._places: dict[int, set[str]] = {}  # by length
        tried = []
        for pattern in values:
            if _PLAIN.fullmatch(pattern):
                places, text = re.sub(r"\\.|[^.]", " ", pattern), pattern.replace("\\", "")
                self._plain.setdefault((places, text), pattern)
                self._places.setdefault(len(text), set()).add(places)
            else:
                tried.append(pattern)
        if (count := len(tried) + sum(map(len, self._places.values()))) > MAX_PATTERNS:
            raise bad(f"{key} holds too many patterns", count, f"{MAX_PATTERNS}, and any number of plain names")
        self._tried = [(pattern, trials.compile(key, pattern, r"(.*\.)?(PATTERN)$")) for pattern in tried]

    def get(self, module: str, default):
        found = []
        for end in (*ends(module), "^" + module):
            for places in self._places.get(len(end), ()):
                text = "".join("." if place == "." else c for place, c in zip(places, end, strict=True))
                found += [self._plain[places, text]] if (places, text) in self._plain else []
        found += next(([pattern] for pattern, compiled in self._tried if self._trials(compiled.match, module)), [])
        return self._values.get(min(found, key=self._order.__getitem__, default=module), default)


def _work(pattern: str) -> float:
    """About how many steps a valid pattern takes on one name at most; inf where that may be exponential or cannot be told."""
    groups = [[(1, "")]]  # the open ones, each a list of branches: ways to try one and, where it is plain, its text
    before, single = None, False  # ways of the branch up to the last element, None where that cannot be repeated; whether it is no group
    for token in _TOKEN.finditer(pattern):
        kind, text, last = token.lastgroup, token[0], before
        before = None
        if kind == "open":
            groups.append([(1, "")])
        elif kind == "bar":
            groups[-1].append((1, ""))
        elif kind == "close":
            inner, (before, _), single = _ways(groups.pop()), groups[-1][-1], False
            groups[-1][-1] = before * inner, None
        elif kind == "back" or (kind == "repeat" and (last is None or not (single or text[0] == "?"))):
            return math.inf
        elif kind == "repeat":
            groups[-1][-1] = last * REPEAT if text[0] != "?" else groups[-1][-1][0] + last, None
        else:
            (before, plain), single = groups[-1][-1], True
            groups[-1][-1] = before, plain + text[-1] if kind == "char" and plain is not None else None
    return _ways(groups.pop()) * (1 + pattern.count("|"))


def _ways(branches: list[tuple[int, str | None]]) -> int:
    """Of branches that are plain text, only those match together of which one begins the next."""
    if any(plain is None for _, plain in branches):
        return sum(ways for ways, _ in branches)
    chain, most = [], 0
    for _, plain in sorted(branches):
        while chain and not plain.startswith(chain[-1]):
            chain.pop()
        chain.append(plain)
        most = max(most, len(chain))
    return most


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def bad(what: str, got: object = None, allowed: object = None, fix: str | None = None) -> LoraValueError:
    return LoraValueError(message(f"adapter_config.json: {what}", got, allowed, fix))
