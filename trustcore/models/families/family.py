"""What tells one family of decoders from another: how its configuration is read, and the names of its weights.

A brand is a `Family` in the table of `trustcore.models.families`; it takes no class of its own. `read` fills a
`DecoderConfig`, whose switches are all that the model sees; `names` is a map in two directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.name_map import Rule
from trustcore.models.values import Values


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a family's weights in one kind of file.

    Attributes:
        model: rules of the whole model.
        layer: rules of a layer, `{}` being its number. A rule whose parameters a model does not have is left out.
        prefix: with which most names begin, and in place of which some files have one of `prefixes`.
        prefixes: see `prefix`.
        ignored: endings of names that are in files and are no weights.
    """

    model: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    prefix: str = ""
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def adapted(self, found: Mapping[str, Any]) -> Names:
        """Returns the names with the prefix that the names `found` in a file have."""
        first = self.model[0].stored  # the embedding, which every file has
        for prefix in self.prefixes:
            if first not in found and prefix + first.removeprefix(self.prefix) in found:
                return dataclasses.replace(
                    self, model=self._under(prefix, self.model), layer=self._under(prefix, self.layer), prefixes=()
                )
        return self

    def _under(self, prefix: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
        def renamed(name: str) -> str:
            return prefix + name.removeprefix(self.prefix) if name.startswith(self.prefix) else name

        return tuple(dataclasses.replace(rule, stored=renamed(rule.stored)) for rule in rules)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """How GGUF files hold a family.

    Attributes:
        name: their `general.architecture`.
        names: of the weights.
        interleaved: whether they hold query and key rows for interleaved rotary pairs.
        read: what the configuration has besides the fields that all architectures share.
        write: metadata besides those that all architectures share, without the architecture's name.
        own: whether the name is the family's own (Mistral's files call themselves "llama").
    """

    name: str
    names: Names
    interleaved: bool = False
    read: Callable[[Values, Mapping[str, Any]], Mapping[str, Any]] = lambda values, fields: {}
    write: Callable[[DecoderConfig], Mapping[str, Any]] = lambda config: {}
    own: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        name: Hugging Face's `model_type`.
        models: that belong to it, for people.
        architecture: the class that Hugging Face's config.json names.
        read: the fields of a `DecoderConfig`, of a config.json's values.
        names: of the weights in Hugging Face's files, or what gives them where they depend on the configuration.
        interleaved: whether those hold queries and keys for interleaved rotary pairs.
        gguf: how GGUF files hold it; None: not supported.
        describe: entries of config.json besides those that all families share; None: it cannot be written.
    """

    name: str
    models: str
    architecture: str
    read: Callable[[Values], Mapping[str, Any]]
    names: Names | Callable[[DecoderConfig], Names]
    interleaved: bool = False
    gguf: Gguf | None = None
    describe: Callable[[DecoderConfig], Mapping[str, Any]] | None = None

    def names_for(self, config: DecoderConfig) -> Names:
        """Returns the names of the weights of a model of that configuration."""
        return self.names if isinstance(self.names, Names) else self.names(config)


def names_of(
    model: Sequence[Rule],
    layer: Sequence[Rule],
    *,
    prefix: str,
    block: str,
    output: Rule | None = None,
    prefixes: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> Names:
    """Returns the names of a family whose rules are written without what all of them begin with.

    Args:
        model: rules of the whole model below `prefix`, the embedding first.
        layer: rules of a layer, below `prefix` + `block`; paths are those within a block.
        prefix: of the model.
        block: of a layer, with `{}` for its number.
        output: rule of the output layer, which stands outside of the prefix.
        prefixes, ignored: see `Names`.
    """
    whole = tuple(dataclasses.replace(rule, stored=prefix + rule.stored) for rule in model)
    layers = tuple(
        dataclasses.replace(
            rule, stored=f"{prefix}{block}{rule.stored}", paths=tuple(f"blocks.{{}}.{path}" for path in rule.paths)
        )
        for rule in layer
    )
    return Names((*whole, *([output] if output else [])), layers, prefix, prefixes, ignored)
