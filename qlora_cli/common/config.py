"""The base of every section and variant of a recipe."""

from __future__ import annotations

from functools import cache
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from qlora_cli.common.docstrings import attribute_docs
from qlora_cli.common.user_paths import expand_path

UserPath = Annotated[str, AfterValidator(expand_path)]
"""A path in a recipe; or, where the key takes one, the id of a model or dataset on the Hub."""


class Config(BaseModel):
    """A frozen section of a recipe: fields are YAML keys, field docstrings their documentation.

    Unknown keys are errors, so that a misspelt setting never silently trains with a default.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        # Validate our own defaults, so that a wrong one is never released.
        validate_default=True,
        # `model` is a section of the recipe, not one of pydantic's names.
        protected_namespaces=(),
        # Build a validator when it is first used: a recipe uses few of the variants.
        defer_build=True,
    )


@cache
def field_docs(config_class: type[Config]) -> dict[str, str]:
    """Return the docstrings of a config class's fields, inherited ones included.

    A field without a docstring has the description of its type, for types that several classes use.

    Docstrings are read from the source on demand: pydantic's `use_attribute_docstrings` reads it
    when a class is defined, which takes a quarter of the time of `qlora validate`.
    """
    docs = {
        name: info.description
        for name, info in config_class.model_fields.items()
        if info.description
    }
    docs |= attribute_docs(config_class, Config)
    return {name: docs[name] for name in config_class.model_fields if name in docs}
