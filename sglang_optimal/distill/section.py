"""The base of every mapping in a run's YAML file."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Unknown keys are errors, and the docstrings under the keys become the descriptions in the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def given(self) -> dict[str, Any]:
        """The keys that have a value."""
        return self.model_dump(exclude_none=True)


def optional_key(field: FieldInfo, kind: Any = None) -> Any:
    """A key of another section as one that may be left out, for `pydantic.create_model`.

    Args:
        field: that key.
        kind: its type, in the place of its own.
    """
    if kind is None:
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return kind | None, Field(None, description=field.description, json_schema_extra=field.json_schema_extra)


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}.") from None
    return value


RegularExpression = Annotated[str, AfterValidator(_compiles)]
"""One of Python's."""
