"""The names of a model's weights in one kind of file: rules, and how real files depart from them.

    Names --(configuration)--> rules, as we write them --(the names in a file)--> rules, as that file has them

A file may put another prefix before most names, spell some of them as older programs or Flax's layers did, hold a
tensor under another of its names or under several, and hold what no model reads. What is packed has names of its own
behind a module's (`qweight`, `weight.codes`), by which that module is known.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from trustcore.models.name_map import Rule, expand, numbered


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a family's weights in one kind of file; rules whose parameters a model does not have are left out.

    Attributes:
        body: rules of the model, as they stand behind the prefix.
        layer: rules of a layer, `{}` being its number.
        head: rules of what stands outside of the prefix, such as an output layer.
        prefix: of the names of body and layers.
        prefixes: that files may have in its place.
        ignored: patterns (`cls.*`, without the prefix) of names that are in files and are not read.
        spellings: older endings of names, and those that stand for them here.
    """

    body: tuple[Rule, ...]
    layer: tuple[Rule, ...] = ()
    head: tuple[Rule, ...] = ()
    prefix: str = ""
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def rules(self, config: Any, prefix: str | None = None) -> tuple[Rule, ...]:
        """Returns the rules of a model of that configuration; `prefix` stands in for the usual one."""
        prefix = self.prefix if prefix is None else prefix
        layers = numbered(config.layers, self.layer) if self.layer else ()
        inside = (
            dataclasses.replace(
                rule, stored=prefix + rule.stored, others=(*(prefix + name for name in rule.others), *rule.others)
            )
            for rule in (*self.body, *layers)
        )
        return expand((*inside, *self.head), config)

    def in_file(self, config: Any, given: Collection[str]) -> tuple[tuple[Rule, ...], str]:
        """Returns the rules with the names that a file has, and its prefix; `given` are the names of its tensors."""
        known = described_by(given)
        choices = [(prefix, self.rules(config, prefix)) for prefix in (self.prefix, *self.prefixes)]
        prefix, rules = max(choices, key=lambda choice: sum(_is_there(rule, known) for rule in choice[1]))

        def named(rule: Rule) -> Rule:
            old = (rule.stored.removesuffix(new) + old for old, new in self.spellings if rule.stored.endswith(new))
            choices = [dataclasses.replace(rule, stored=name) for name in (rule.stored, *rule.others, *old)]
            choices += [spelled for choice in choices for spelled in _in_flax(choice)]
            found = (choice for names in (given, known) for choice in choices if choice.names[0] in names)
            return next(found, rule)

        return tuple(named(rule) for rule in rules), prefix

    def ignores(self, name: str, prefix: str | None = None) -> bool:
        """Returns whether a file of that prefix may hold this tensor, though nothing reads it."""
        short = name.removeprefix(self.prefix if prefix is None else prefix)
        return any(fnmatch.fnmatchcase(given, pattern) for pattern in self.ignored for given in (name, short))


def described_by(given: Iterable[str]) -> frozenset[str]:
    """Returns the names of tensors, and those of the weights that several of them make together where they are packed.

    `layer.qweight`, or `layer.weight.codes`, tell that there is a `layer.weight`.
    """

    def each(name: str) -> Iterator[str]:
        module = name.rpartition(".")[0]
        return iter((name, module, f"{module}.weight"))

    return frozenset(found for name in given for found in each(name))


def _in_flax(rule: Rule) -> Iterator[Rule]:
    """How Flax's layers name and lay out what PyTorch's call `weight`: as a rule, whatever the family.

    Matrices lie the other way round, also those that PyTorch holds `[in, out]` (GPT-2's); convolutions lie as here.
    """
    module = rule.stored.removesuffix(".weight")
    if module != rule.stored:
        turned = not rule.rows_first and not rule.convolved
        if rule.is_matrix or rule.convolved:
            yield dataclasses.replace(rule, stored=f"{module}.kernel", rows_first=turned, convolved=False)
        yield from (dataclasses.replace(rule, stored=f"{module}.{name}") for name in ("embedding", "scale"))


def _is_there(rule: Rule, known: frozenset[str]) -> bool:
    return rule.names[0] in known or any(name in known for name in rule.others)


def under(path: str, stored: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns rules that were written without what all their paths, and all their names, begin with."""
    return tuple(
        dataclasses.replace(
            rule,
            paths=tuple(path + inner for inner in rule.paths),
            stored=stored + rule.stored,
            others=tuple(stored + name for name in rule.others),
        )
        for rule in rules
    )
