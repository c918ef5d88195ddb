"""Values of trait expressions for one config, and the tensors that trait entries describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from profiles.errors import BadConfig
from profiles.expressions import compile_expression
from profiles.facts import Facts
from profiles.schema import Linear, Norm, Parameter

LARGEST_TENSOR_SIZE = 10**9
_MISFIT = (TypeError, ValueError, ZeroDivisionError, IndexError, KeyError, OverflowError, AttributeError)


class Evaluator:
    """Names of one scope: layer variables, then the trait file's `let`, then the config's fields.

    `scopes` are other configs that expressions may reach by name (`vision.hidden_size`).
    """

    def __init__(self, facts: Facts, let: Mapping[str, Any], scopes: Mapping[str, Any] | None = None) -> None:
        self.facts = facts
        self.let = let
        self.scopes: dict[str, Any] = dict(scopes or {})
        self._memo: dict[str, Any] = {}

    def lookup(self, name: str) -> Any:
        """The value of a name. Errors: `BadConfig` as `Facts.lookup`."""
        if name in self._memo:
            return self._memo[name]
        if name in self.let:
            value = self._memo[name] = self.value(self.let[name])
        elif name in self.scopes:
            value = self.scopes[name]
        else:
            value = self.facts.lookup(name)
        return value

    def value(self, entry: Any) -> Any:
        """An expression's value; anything that is no text stands for itself.

        Errors: `BadConfig` where the config's fields do not fit together (a list too short, heads above
        width).
        """
        if not isinstance(entry, str):
            return entry
        try:
            return compile_expression(entry)(self)
        except _MISFIT as error:
            raise BadConfig(
                f"the config's fields do not fit together: {entry} ({type(error).__name__})",
                f"{self.facts.model_type} computes this from config.json",
            ) from None

    def size(self, entry: Any) -> int:
        """A tensor dimension: a positive int. Errors: `BadConfig`."""
        value = self.value(entry)
        if type(value) is not int or not 0 < value <= LARGEST_TENSOR_SIZE:
            raise BadConfig(f"the config's fields do not fit together: {entry} is {str(value)[:40]}")
        return value

    def optional_size(self, entry: Any) -> int | None:
        """A size, or None for null, false and 0."""
        return self.size(entry) if self.value(entry) else None

    def at_layer(self, variables: Mapping[str, Any]) -> LayerScope:
        """The same scope with a layer's variables in front."""
        return LayerScope(self, variables)

    def entries(self, section: Mapping[str, Any]) -> Iterator[tuple[str, Any, Evaluator]]:
        """Entries of a trait section with `name if condition` and `name{n} for count` written out."""
        for key, entry in section.items():
            name, _, condition = key.partition(" if ")
            name, _, repeat = name.partition(" for ")
            if condition and not self.value(condition):
                continue
            if not repeat:
                yield name, entry, self
                continue
            count = self.value(repeat)
            if type(count) is not int or not 0 <= count <= 1000:
                raise BadConfig(f"the config's fields do not fit together: {repeat} is {str(count)[:40]}")
            for n in range(count):
                yield name.replace("{n}", str(n)), entry, self.at_layer({"n": n})


class LayerScope(Evaluator):
    """A scope with variables in front of another."""

    def __init__(self, outer: Evaluator, variables: Mapping[str, Any]) -> None:
        super().__init__(outer.facts, {})
        self.outer = outer
        self._memo = dict(variables)

    def set(self, name: str, value: Any) -> None:
        """Give a variable its value."""
        self._memo[name] = value

    def forget(self, name: str) -> None:
        """Take a variable away again."""
        del self._memo[name]

    def lookup(self, name: str) -> Any:
        return self._memo[name] if name in self._memo else self.outer.lookup(name)


def linears(scope: Evaluator, section: Mapping[str, Any]) -> tuple[Linear, ...]:
    """`name: [inputs, outputs, bias, transposed, {options}]` entries as `Linear`; bias and transposed
    default to no, the option `quantized` to yes."""
    found = []
    for name, stated, at in scope.entries(section):
        options = stated[-1] if isinstance(stated[-1], dict) else {}
        entry = [item for item in stated if not isinstance(item, dict)]
        bias = bool(at.value(entry[2])) if len(entry) > 2 else False
        transposed = bool(entry[3]) if len(entry) > 3 else False
        quantized = bool(at.value(options.get("quantized", True)))
        found.append(Linear(name, at.size(entry[0]), at.size(entry[1]), bias, transposed, quantized))
    return tuple(found)


def norms(scope: Evaluator, section: Mapping[str, Any]) -> tuple[Norm, ...]:
    """`name: [kind, size, bias, weight]` entries as `Norm`; bias defaults to no, weight to yes."""
    return tuple(norm(at, name, entry) for name, entry, at in scope.entries(section))


def norm(scope: Evaluator, name: str, entry: list[Any]) -> Norm:
    """One norm. The kind is `rms` or `layer`."""
    return Norm(
        name,
        scope.size(entry[1]),
        entry[0],
        bool(scope.value(entry[2])) if len(entry) > 2 else False,
        bool(scope.value(entry[3])) if len(entry) > 3 else True,
    )


def parameters(scope: Evaluator, section: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """`name: [dim, ..., {options}]` entries as `Parameter`; options are those of `profiles.schema`."""
    found = []
    for name, entry, at in scope.entries(section):
        options = entry[-1] if entry and isinstance(entry[-1], dict) else {}
        shape = tuple(at.size(dim) for dim in entry if not isinstance(dim, dict))
        float32, buffer, boolean = (bool(options.get(key)) for key in ("float32", "buffer", "boolean"))
        found.append(Parameter(name, shape, float32, buffer, options.get("persistent", True), boolean))
    return tuple(found)
