"""The small arithmetic language of the trait files: `num_attention_heads * head_dim`.

Trait files are data; shapes in them are arithmetic over config fields. This reads such arithmetic into a tree
of closures once and evaluates it against a scope. There is no way to reach anything but the scope's names and
the functions listed here.

    expr   := or [ "if" or "else" expr ]
    or     := and { "or" and };  and := not { "and" not };  not := "not" not | compare
    compare:= sum [ ( == != < <= > >= in "not in" ) sum ]
    sum    := term { ( + - ) term };  term := unary { ( * // / % ) unary }
    unary  := "-" unary | postfix [ "**" unary ]
    postfix := atom { "[" expr "]" | "." name }
    atom   := number | 'text' | name | name "(" expr, ... ")" | "(" expr ")" | "[" expr, ... "]"

`or` and `and` return operands as in Python, so `head_dim or hidden_size // num_attention_heads` reads as it
looks. Constants: `true`, `false`, `null`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

Value = Any
"""An int, float, bool, text, list, mapping or None: what JSON holds."""


class Scope(Protocol):
    """Where names get their values."""

    def lookup(self, name: str) -> Value:
        """The value of a name; raises what the caller wants the user to see."""
        ...


Code = Callable[[Scope], Value]

_TOKEN = re.compile(r"\s*(?:(\d+\.\d+|\d+)|([A-Za-z_]\w*)|'([^']*)'|(==|!=|<=|>=|//|\*\*|[-+*/%<>()\[\],.]))")
_KEYWORDS = frozenset({"if", "else", "and", "or", "not", "in"})
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "/": operator.truediv,
    "%": operator.mod,
}  # fmt: skip


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _power(base: int, exponent: int) -> Value:
    if not -64 <= exponent <= 64:
        raise ValueError("exponent out of range")
    return base**exponent


def _is(value: Value, kind: str) -> bool:
    kinds = {"list": list, "mapping": dict, "text": str, "int": int}
    return isinstance(value, kinds[kind])


def _override(table: Any, index: int, name: str, default: Value) -> Value:
    """`per_layer_config[index][name]`, whose keys are numbers written with or without leading zeros."""
    for key, fields in table.config.items():
        if key.isdecimal() and int(key) == index and name in fields:
            value = fields[name]
            if type(value) is not int or not 0 < value <= 10**7:
                raise ValueError(f"{name} of layer {index} is no size")
            table.used[f"{table.prefix}{key}.{name}"] = value
            return value
    return default


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "min": min, "max": max, "len": len, "int": int, "is": _is, "round_up": _round_up, "override": _override,
}  # fmt: skip


class _Reader:
    """Recursive descent over one expression's tokens."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise SyntaxError(f"cannot read {text[position:]!r} in {text!r}")
            number, name, quoted, symbol = match.groups()
            if number is not None:
                self.tokens.append(("number", number))
            elif name is not None:
                self.tokens.append(("symbol" if name in _KEYWORDS else "name", name))
            elif quoted is not None:
                self.tokens.append(("text", quoted))
            else:
                self.tokens.append(("symbol", symbol))
            position = match.end()
        self.at = 0

    def peek(self, *symbols: str) -> bool:
        return (
            self.at < len(self.tokens)
            and self.tokens[self.at][0] == "symbol"
            and self.tokens[self.at][1] in symbols
        )

    def take(self, *symbols: str) -> str | None:
        if not self.peek(*symbols):
            return None
        self.at += 1
        return self.tokens[self.at - 1][1]

    def need(self, symbol: str) -> None:
        if self.take(symbol) is None:
            raise SyntaxError(f"expected {symbol!r} in {self.text!r}")

    def expression(self) -> Code:
        value = self.either()
        if self.take("if") is None:
            return value
        condition = self.either()
        self.need("else")
        other = self.expression()
        return lambda s: value(s) if condition(s) else other(s)

    def either(self) -> Code:
        left = self.both()
        while self.take("or"):
            left = _or(left, self.both())
        return left

    def both(self) -> Code:
        left = self.negation()
        while self.take("and"):
            left = _and(left, self.negation())
        return left

    def negation(self) -> Code:
        if self.take("not"):
            inner = self.negation()
            return lambda s: not inner(s)
        return self.comparison()

    def comparison(self) -> Code:
        left = self.sum()
        if symbol := self.take(*_COMPARE):
            return _binary(_COMPARE[symbol], left, self.sum())
        if self.take("in"):
            right = self.sum()
            return lambda s: left(s) in right(s)
        if self.take("not"):
            self.need("in")
            right = self.sum()
            return lambda s: left(s) not in right(s)
        return left

    def sum(self) -> Code:
        left = self.term()
        while symbol := self.take("+", "-"):
            left = _binary(_ARITHMETIC[symbol], left, self.term())
        return left

    def term(self) -> Code:
        left = self.unary()
        while symbol := self.take("*", "//", "/", "%"):
            left = _binary(_ARITHMETIC[symbol], left, self.unary())
        return left

    def unary(self) -> Code:
        if self.take("-"):
            inner = self.unary()
            return lambda s: -inner(s)
        base = self.postfix()
        return _binary(_power, base, self.unary()) if self.take("**") else base

    def postfix(self) -> Code:
        value = self.atom()
        while symbol := self.take("[", "."):
            if symbol == "[":
                value = _item(value, self.expression())
                self.need("]")
            else:
                value = _member(value, self.name())
        return value

    def name(self) -> str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != "name":
            raise SyntaxError(f"expected a name in {self.text!r}")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def items(self, end: str) -> list[Code]:
        items: list[Code] = []
        while self.take(end) is None:
            items.append(self.expression())
            if self.take(",") is None:
                self.need(end)
                break
        return items

    def atom(self) -> Code:
        if self.at >= len(self.tokens):
            raise SyntaxError(f"unfinished expression {self.text!r}")
        kind, token = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return _constant(float(token) if "." in token else int(token))
        if kind == "text":
            return _constant(token)
        if kind == "name":
            if token in _CONSTANTS:
                return _constant(_CONSTANTS[token])
            if token in _FUNCTIONS and self.take("("):
                return _call(_FUNCTIONS[token], self.items(")"))
            return lambda s: s.lookup(token)
        if token == "(":
            inner = self.expression()
            self.need(")")
            return inner
        if token == "[":
            elements = self.items("]")
            return lambda s: [element(s) for element in elements]
        raise SyntaxError(f"unexpected {token!r} in {self.text!r}")


def _constant(value: Value) -> Code:
    return lambda s: value


def _binary(apply: Callable[[Any, Any], Value], left: Code, right: Code) -> Code:
    return lambda s: apply(left(s), right(s))


def _or(left: Code, right: Code) -> Code:
    return lambda s: left(s) or right(s)


def _and(left: Code, right: Code) -> Code:
    return lambda s: left(s) and right(s)


def _item(value: Code, index: Code) -> Code:
    return lambda s: value(s)[index(s)]


def _call(function: Callable[..., Value], arguments: list[Code]) -> Code:
    return lambda s: function(*[argument(s) for argument in arguments])


def _member(value: Code, name: str) -> Code:
    def read(s: Scope) -> Value:
        inner = value(s)
        return inner.lookup(name) if hasattr(inner, "lookup") else inner[name]

    return read


@lru_cache(maxsize=4096)
def compile_expression(text: str) -> Code:
    """A function from scope to value.

    Errors: `SyntaxError` for text outside the grammar (a mistake in a trait file).

    >>> class Fields(dict):
    ...     lookup = dict.__getitem__
    >>> compile_expression("head_dim or hidden // heads")(Fields(head_dim=None, hidden=64, heads=4))
    16
    """
    reader = _Reader(text)
    code = reader.expression()
    if reader.at != len(reader.tokens):
        raise SyntaxError(f"trailing text in {text!r}")
    return code
