"""Keys of a configuration whose values are entries of a table: a key takes what its table holds, and nothing else.

`Annotated[str, NameIn(TABLE)]` is the name of an entry; `Annotated[Base, KindIn(TABLE)]` a group of keys whose `kind`
names one of the table's models. Tables are looked at when a value is checked, so an entry is all that a new one needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from potstill.common.nearest import nearest_keys


class NameIn:
    """The value is the name of an entry of `table`."""

    def __init__(self, table: Mapping[str, object]) -> None:
        self.table = table

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.names), "type": "string"}

    def check(self, value: object) -> str:
        """The name itself. Raises an error that lists all names, with those that are nearest to what was found."""
        if isinstance(value, str) and value in self.table:
            return value
        near = nearest_keys(value, dict.fromkeys(self.names, "")) if isinstance(value, str) else []
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise PydanticCustomError("unknown_name", "{text}", {"text": f"Input should be {_one_of(self.names)}{hint}"})


class KindIn:
    """The value is a group of keys; its key `kind` names the model of `table` that the others belong to."""

    def __init__(self, table: Mapping[str, type[BaseModel]]) -> None:
        self.table = table

    @property
    def models(self) -> tuple[type[BaseModel], ...]:
        return tuple(self.table.values())

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        union: Any = reduce(or_, self.models)
        return handler(TypeAdapter(Annotated[union, Field(discriminator="kind")]).core_schema)

    def check(self, value: object) -> BaseModel:
        """The checked model. Raises what a union by `kind` would: kind missing or unknown, or a key that is wrong."""
        if isinstance(value, self.models):
            return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        if "kind" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        model = self.table.get(value["kind"]) if isinstance(value["kind"], str) else None
        if model is None:
            expected = ", ".join(map(repr, self.table))
            found = {"discriminator": "'kind'", "tag": str(value["kind"]), "expected_tags": expected}
            raise PydanticKnownError("union_tag_invalid", found)
        return model.model_validate(value)


def _one_of(names: tuple[str, ...]) -> str:
    words = [repr(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def annotation_of(field: FieldInfo) -> Any:
    """The annotation of a key with its table, which pydantic keeps apart from it."""
    marks = [mark for mark in field.metadata if isinstance(mark, NameIn | KindIn)]
    return Annotated[field.annotation, marks[0]] if marks else field.annotation


def table_of(annotation: Any) -> NameIn | KindIn | None:
    """The table that an annotation takes its values from, or None."""
    if get_origin(annotation) is not Annotated:
        return None
    return next((mark for mark in get_args(annotation)[1:] if isinstance(mark, NameIn | KindIn)), None)
