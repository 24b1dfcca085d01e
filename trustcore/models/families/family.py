"""What tells one family of decoders from another: how its configuration is read, and the names of its weights.

A brand is a `Family` in the table of `trustcore.models.families`; it takes no class of its own. `read` fills a
`DecoderConfig`, whose switches are all that the model sees; `names` is a map in two directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.names import Names
from trustcore.models.values import Values


@dataclasses.dataclass(frozen=True)
class Gguf:
    """How GGUF files hold a family.

    Attributes:
        name: their `general.architecture`.
        names: of the weights.
        interleaved: whether they hold query and key rows for interleaved rotary pairs.
        read: what the configuration has besides the fields that all architectures share.
        seen: what the configuration has by the names of the file's tensors, where the metadata do not tell.
        write: metadata besides those that all architectures share, without the architecture's name.
        own: whether the name is the family's own (Mistral's files call themselves "llama").
        experts: whether the family is that of the files which have experts (Mixtral's, too, are called "llama").
        whole_pairs: whether YaRN's ramp begins and ends at whole pairs of channels, which files do not tell.
        variant: names of the weights where they depend on the configuration; None: `names` are those of all.
        older: names in files of earlier programs, by a tensor that only those have.
    """

    name: str
    names: Names
    interleaved: bool = False
    read: Callable[[Values, Mapping[str, Any]], Mapping[str, Any]] = lambda values, fields: {}
    seen: Callable[[Collection[str]], Mapping[str, Any]] = lambda found: {}
    write: Callable[[DecoderConfig], Mapping[str, Any]] = lambda config: {}
    own: bool = True
    experts: bool = False
    whole_pairs: bool = True
    variant: Callable[[DecoderConfig], Names] | None = None
    older: Mapping[str, Names] = dataclasses.field(default_factory=dict)

    def names_in(self, found: Collection[str]) -> Names:
        """Returns the names of the weights in a file that has the names `found`."""
        return next((names for name, names in self.older.items() if name in found), self.names)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        name: Hugging Face's `model_type`.
        models: that belong to it, for people.
        architecture: the class that Hugging Face's config.json names.
        read: the fields of a `DecoderConfig`, of a config.json's values.
        describe: the entries of config.json, but for the type and the class: what `read` takes, out of a configuration.
        names: of the weights in Hugging Face's files, or what gives them where they depend on the configuration.
        interleaved: whether those hold queries and keys for interleaved rotary pairs.
        gguf: how GGUF files hold it; None: not supported.
    """

    name: str
    models: str
    architecture: str
    read: Callable[[Values], Mapping[str, Any]]
    describe: Callable[[DecoderConfig], Mapping[str, Any]]
    names: Names | Callable[[DecoderConfig], Names]
    interleaved: bool = False
    gguf: Gguf | None = None

    def names_for(self, config: DecoderConfig) -> Names:
        """Returns the names of the weights of a model of that configuration."""
        return self.names if isinstance(self.names, Names) else self.names(config)
