"""The base of every section and variant of a recipe."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A frozen piece of a recipe: its fields are the YAML keys, their docstrings the documentation.

    Unknown keys are errors, so a misspelt setting can never train with a default in silence.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        # Defaults are code of ours; validating them keeps a wrong one from ever shipping.
        validate_default=True,
        # `model` is a section of the recipe and not one of pydantic's own names.
        protected_namespaces=(),
    )
