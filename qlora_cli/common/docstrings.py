"""Read the docstrings of attributes, which Python itself does not keep."""

from __future__ import annotations

import ast
import inspect
import textwrap


def attribute_docs(owner: type, base: type) -> dict[str, str]:
    """Return the docstrings below the annotated attributes of a class, inherited ones included.

    Read from the source on demand. (pydantic's `use_attribute_docstrings` does so whenever a class
    is made, which takes a quarter of the time of `qlora validate`.)

    Args:
        base: classes that do not derive from it, and `base` itself, are skipped.
    """
    docs: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        if not issubclass(one, base) or one is base:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for field, following in zip(definition.body, definition.body[1:], strict=False):
            match field, following:
                case (
                    ast.AnnAssign(target=ast.Name(name)),
                    ast.Expr(ast.Constant(str(text))),
                ):
                    docs[name] = inspect.cleandoc(text)
    return docs
