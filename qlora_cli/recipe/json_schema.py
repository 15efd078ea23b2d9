"""The JSON Schema of recipe files, for editors and other programs.

It accepts one spelling of each value: numbers, true and false, and strings. The loader also accepts
spellings that YAML versions disagree on, such as `2e-4` and `yes`.
"""

from __future__ import annotations

import inspect
from typing import Any

from qlora_cli.common.config import Config, field_docs
from qlora_cli.recipe.field_types import FieldType
from qlora_cli.recipe.schema import Recipe

Schema = dict[str, Any]

_EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "Path of a recipe to build on, relative to this file. Keys missing here "
    "are taken from it.",
}


def recipe_schema() -> Schema:
    """Build the schema (draft 2020-12) of what `load_recipe` accepts.

    Keys are required only in files without `extends`: other files inherit them.
    """
    generated = Recipe.model_json_schema()
    parts = {part.__name__: part for part in _parts(Recipe)}
    definitions = {
        name: _section(parts[name], body) for name, body in sorted(generated.pop("$defs").items())
    }
    root = _section(Recipe, generated)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of qlora",
        **root,
        "properties": {"extends": _EXTENDS, **root["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": _required(Recipe),
        "$defs": definitions,
    }


def _parts(part: type[Config]) -> set[type[Config]]:
    below: set[type[Config]] = {part}
    for info in part.model_fields.values():
        for part_below in FieldType.of(info).all_sections:
            below |= _parts(part_below)
    return below


def _section(part: type[Config], body: Schema) -> Schema:
    """The schema of a section, with nothing required and every key described."""
    properties = {name: _cleaned(schema) for name, schema in body["properties"].items()}
    for name, text in field_docs(part).items():
        properties[name]["description"] = text
    about = inspect.getdoc(part) or ""
    if "type" in properties:
        properties["type"]["description"] = about.partition("\n\n")[0]
        properties = {"type": properties["type"], **properties}
    for name, info in part.model_fields.items():
        item = FieldType.of(info).item
        if item and item.sections:
            _list_schema(properties[name])["items"] |= _required_in(item)
    return {
        "type": "object",
        "description": about,
        "properties": properties,
        "additionalProperties": False,
    }


def _list_schema(schema: Schema) -> Schema:
    """The part of a field's schema that describes lists."""
    return next((one for one in schema.get("anyOf", []) if one.get("type") == "array"), schema)


def _cleaned(schema: Any) -> Any:
    """Remove pydantic's titles and OpenAPI's discriminator.

    A section that inherits its `type` from a base recipe fits several variants: hence `anyOf`.
    """
    if isinstance(schema, list):
        return [_cleaned(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"oneOf": "anyOf"}
    dropped = ("title", "discriminator")
    return {names.get(k, k): _cleaned(v) for k, v in schema.items() if k not in dropped}


def _required(part: type[Config]) -> Schema:
    """The required keys at every depth of a section."""
    fields = part.model_fields
    below = {name: _required_in(FieldType.of(info)) for name, info in fields.items()}
    return {
        "required": [name for name, info in fields.items() if info.is_required()],
        "properties": {name: schema for name, schema in below.items() if schema},
    }


def _required_in(field_type: FieldType) -> Schema:
    if field_type.variants:
        return {"required": ["type"]}
    return _required(field_type.sections[0]) if field_type.sections else {}
