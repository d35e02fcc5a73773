"""Small JSON schemas at random, and whether a value is valid by one: written apart from what makes grammars of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

KEYS = ("a", "b", 'q"', "n 1")
VALUES = ("x", 'y"', "", 3, -1, True, False, None, [1, "z"], {"k": 0})


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw(inner) for name in names}}
    if not names:
        schema["additionalProperties"] = draw(st.one_of(st.just(False), inner))
    if names:
        schema["required"] = draw(st.lists(st.sampled_from(names), unique=True))
    return schema


def bounded(kind: str, low: str, high: str, most: int) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return pairs.map(lambda pair: {"type": kind, low: pair[0], high: pair[1]})


LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
    bounded("string", "minLength", "maxLength", 4),
    st.just({"type": ["boolean", "null"], "title": "t"}),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=3).map(lambda values: {"enum": values}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.tuples(bounded("array", "minItems", "maxItems", 2), inner).map(lambda two: {**two[0], "items": two[1]}),
        st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
    ),
    max_leaves=4,
)


def is_valid(value: Any, schema: Any, root: Any = None) -> bool:
    """By draft 2020-12, for the keywords that are here."""
    root = schema if root is None else root
    if schema is True or schema is False:
        return bool(schema)
    checks = [
        "$ref" not in schema or is_valid(value, target(root, schema["$ref"]), root),
        "const" not in schema or same(value, schema["const"]),
        "enum" not in schema or any(same(value, each) for each in schema["enum"]),
        "anyOf" not in schema or any(is_valid(value, each, root) for each in schema["anyOf"]),
        "type" not in schema or any(of_type(value, each) for each in as_list(schema["type"])),
    ]
    if isinstance(value, str):
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        checks += [is_valid(each, schema.get("items", True), root) for each in value]
    if isinstance(value, dict):
        own, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks += [key in value for key in schema.get("required", ())]
        checks += [is_valid(each, own.get(key, more), root) for key, each in value.items()]
    return all(checks)


def as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    kinds: dict[str, Any] = {"null": type(None), "string": str, "number": (int, float), "integer": int}
    return isinstance(value, {**kinds, "array": list, "object": dict, "boolean": bool}[kind])


def target(root: Any, reference: str) -> Any:
    for part in reference.split("/")[1:]:
        root = root[part]
    return root
