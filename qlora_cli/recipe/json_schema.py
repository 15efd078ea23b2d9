"""The JSON Schema of recipe files, for editors and other programs.

It knows one spelling of each value: numbers as numbers, truth values as true and false, text as
text. The loader also takes what YAML readers disagree on, such as `2e-4` and `yes`.
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
    "description": "A recipe, beside this one, to build on: what this file does not say is taken "
    "from there.",
}


def recipe_schema() -> Schema:
    """A schema (draft 2020-12) of what `load_recipe` reads.

    Required keys are asked for only in files without `extends`: the others get them from below.
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
        field_type = FieldType.of(info)
        for part_below in (
            *field_type.sections,
            *(field_type.item.sections if field_type.item else ()),
        ):
            below |= _parts(part_below)
    return below


def _section(part: type[Config], body: Schema) -> Schema:
    """The schema of a part, with nothing required and no word left without its meaning."""
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
    """What a field says about lists, be it beside other things or alone."""
    return next((one for one in schema.get("anyOf", []) if one.get("type") == "array"), schema)


def _cleaned(schema: Any) -> Any:
    """Without pydantic's titles and OpenAPI's discriminator.

    A section that leaves its `type` to the recipe below fits several variants, so not `oneOf`.
    """
    if isinstance(schema, list):
        return [_cleaned(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"oneOf": "anyOf"}
    dropped = ("title", "discriminator")
    return {names.get(k, k): _cleaned(v) for k, v in schema.items() if k not in dropped}


def _required(part: type[Config]) -> Schema:
    """What must be there, at every depth of a part."""
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
