"""A JSON schema as a grammar: every text of the grammar is JSON (RFC 8259), and valid by the schema (draft 2020-12).

    grammar_of({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})

The grammar may leave out texts that are valid too: properties come in the order in which the schema has them, and those
that it does not name are not written where it names some; after a colon and a comma there may be one space and nowhere
else; numbers have at most 16 digits on each side of the point; texts with bounds have no escapes. Those that it has are
always valid, so a keyword that this module does not know is refused, by name and place, and so are keywords beside each
other that it cannot have both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from partitioner.errors import InputError

__all__ = ["ANY_OBJECT", "COMMON", "grammar_of", "rules_of"]

ANY_OBJECT: dict[str, Any] = {"type": "object"}
LARGEST = 64 << 10
"""Characters of a schema, as JSON."""
DEEPEST = 64
"""Levels of a schema as JSON, and schemas that stand within or for each other."""
_MOST_RULES = 4000
_MOST_TIMES = 1000
"""The largest bound on the length of a text or a list."""

_NOTES = frozenset(
    ("title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions")
)
_BY_TYPE = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength")),
    "number": frozenset[str](),
    "integer": frozenset[str](),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
_ALONE = ("$ref", "anyOf", "enum", "const")
"""Of which a schema has one, with nothing beside it; enum and const may have a type that their values have."""

# what repeats is written as a rule that ends with itself: the next tokens are found far faster than with `*`
COMMON = r"""
any ::= object | array | string | number | boolean | null
object ::= "{" ( pair pairs | "}" )
pairs ::= "}" | comma pair pairs
pair ::= string colon any
array ::= "[" ( any items | "]" )
items ::= "]" | comma any items
string ::= "\"" letters
letters ::= "\"" | [^"\\\x00-\x1f] letters | "\\" escape letters
escape ::= ["\\/bfnrt] | "u" ( [0-9a-cA-CefEF] hex hex hex | [dD] [0-7] hex hex )
hex ::= [0-9a-fA-F]
integer ::= "-"? whole
number ::= "-"? whole ( "." [0-9]{1,16} )? ( [eE] [-+]? [0-9]{1,2} )?
whole ::= "0" | [1-9] [0-9]{0,15}
boolean ::= "true" | "false"
null ::= "null"
comma ::= "," " "?
colon ::= ":" " "?
"""


def grammar_of(schema: Any) -> str:
    """In xgrammar's EBNF. Raises InputError for a schema that is too large or cannot be obeyed; says where."""
    root, rules = rules_of(schema)
    return f"root ::= {root}\n{rules}{COMMON}"


def rules_of(schema: Any, *, prefix: str = "r") -> tuple[str, str]:
    """The rule that stands for a schema, and all that it stands on but those of `COMMON`, named by `prefix`."""
    _require_shallow(schema)
    text = json.dumps(schema)
    if len(text) > LARGEST:
        raise InputError(f"the schema has {len(text)} characters, and may have {LARGEST}")
    return _Writer(schema, prefix).written()


def _require_shallow(schema: Any) -> None:
    level = [schema]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise InputError(f"the schema is nested more than {DEEPEST} levels deep")


class _Writer:
    def __init__(self, schema: Any, prefix: str) -> None:
        self._schema, self._prefix = schema, prefix
        self._rules: dict[str, str] = {}
        self._named: dict[str, str] = {}
        """By the reference, the rule that it stands for."""
        self._same: dict[str, list[str]] = {}
        """By rule, those that its text may be without anything before it."""
        self._depth = 0

    def written(self) -> tuple[str, str]:
        root = self._referred("#", "$")
        self._require_progress()
        return root, "".join(f"{name} ::= {body}\n" for name, body in self._rules.items())

    def _new(self) -> str:
        if len(self._rules) >= _MOST_RULES:
            raise InputError(f"the schema needs more than {_MOST_RULES} rules: make it smaller")
        name = f"{self._prefix}{len(self._rules)}"
        self._rules[name] = ""
        return name

    def _rule(self, schema: Any, at: str) -> str:
        name = self._new()
        self._write(name, schema, at)
        return name

    def _referred(self, reference: Any, at: str) -> str:
        if not isinstance(reference, str) or reference not in self._named:
            target = _target(self._schema, reference, at)
            name = self._named[reference] = self._new()
            self._write(name, target, reference[:80])
        return self._named[reference]

    def _write(self, name: str, schema: Any, at: str) -> None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise InputError(f"{at}: schemas stand for each other more than {DEEPEST} deep")
        self._fill(name, schema, at)
        self._depth -= 1

    def _fill(self, name: str, schema: Any, at: str) -> None:
        """The rule's body, and the rules that it stands on."""
        if schema is True or schema == {}:
            self._rules[name] = "any"
            return
        if not isinstance(schema, dict):
            raise InputError(f"{at}: a schema must be an object, got {_short(schema)}")
        asked = {key: value for key, value in schema.items() if key not in _NOTES}
        alone = next((key for key in _ALONE if key in asked), None)
        if alone is None:
            self._rules[name] = self._by_type(name, asked, at)
            return
        beside = asked.keys() - {alone} - ({"type"} if alone in ("enum", "const") else set())
        if beside:
            raise InputError(
                f"{at}: {_short(sorted(beside)[0])} beside {alone!r} is not offered: leave one of them out"
            )
        value = asked[alone]
        if alone == "$ref":
            self._same[name] = [self._referred(value, at)]
            self._rules[name] = self._same[name][0]
        elif alone == "anyOf":
            options = _list(value, f"{at}.anyOf")
            rules = [self._rule(each, f"{at}.anyOf[{number}]") for number, each in enumerate(options)]
            self._same[name] = rules
            self._rules[name] = " | ".join(rules)
        else:
            values = [value] if alone == "const" else _list(value, f"{at}.enum")
            types = _types(asked.get("type", list(_BY_TYPE)), at)
            for each in values:
                if not any(_has_type(each, kind) for kind in types):
                    raise InputError(f"{at}: {_short(each)} of {alone!r} is not of the type {asked['type']!r}")
            self._rules[name] = " | ".join(_literal(each) for each in values)

    def _by_type(self, name: str, asked: Mapping[str, Any], at: str) -> str:
        keys = asked.keys() - {"type"}
        if "type" in asked:
            types = _types(asked["type"], at)
        else:  # only values of the type that the keywords are about, which are valid
            types = [kind for kind, known in _BY_TYPE.items() if keys & known][:1] or list(_BY_TYPE)
        unknown = keys - frozenset().union(*(_BY_TYPE[kind] for kind in types))
        if unknown:
            raise InputError(
                f"{at}: {_short(sorted(unknown)[0])} is not offered for {' or '.join(types)}: leave it out"
            )
        made = {"object": self._object, "array": self._array, "string": self._string}
        return " | ".join(f"( {made[kind](asked, at)} )" if kind in made else kind for kind in types)

    def _object(self, asked: Mapping[str, Any], at: str) -> str:
        properties, more = asked.get("properties", {}), asked.get("additionalProperties", True)
        if not isinstance(properties, dict):
            raise InputError(f"{at}.properties must be an object, got {_short(properties)}")
        required = asked.get("required", [])
        required = _list(required, f"{at}.required") if required else []
        for key in required:
            if not isinstance(key, str) or key not in properties:
                raise InputError(f"{at}: {_short(key)} is required, and properties does not have it: add it there")
        if not properties:
            if more is False:
                return '"{}"'
            value = self._rule(more, f"{at}.additionalProperties")
            entry = f"string colon {value}"
            return f'"{{" ( {entry} (comma {entry})* )? "}}"'
        if "additionalProperties" in asked and more is not False:
            raise InputError(
                f"{at}: additionalProperties beside properties is not offered: give false, or leave it out, as only "
                "what properties has is written"
            )
        rest, first = '""', '""'  # what may follow a property, and what may begin
        for key, schema in reversed(properties.items()):
            pair = f"{_literal(key)} colon {self._rule(schema, f'{at}.properties.{key[:40]}')}"
            after, begin = self._new(), self._new()
            must = key in required
            self._rules[after] = f"comma {pair} {rest}" + ("" if must else f" | {rest}")
            self._rules[begin] = f"{pair} {rest}" + ("" if must else f" | {first}")
            rest, first = after, begin
        return f'"{{" {first} "}}"'

    def _array(self, asked: Mapping[str, Any], at: str) -> str:
        least, most = _bounds(asked, "minItems", "maxItems", at)
        if most == 0:
            return '"[]"'
        item = self._rule(asked.get("items", True), f"{at}.items")
        times = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        inner = f"{item} ( comma {item} ){times}"
        return f'"[" {inner} "]"' if least else f'"[" ( {inner} )? "]"'

    def _string(self, asked: Mapping[str, Any], at: str) -> str:
        least, most = _bounds(asked, "minLength", "maxLength", at)
        if not least and most is None:
            return "string"
        # with escapes as well, to find the next tokens would take a hundred times as long
        return f'"\\"" [^"\\\\\\x00-\\x1f]{{{least},{"" if most is None else most}}} "\\""'

    def _require_progress(self) -> None:
        """Raises where a rule stands for itself, so that its text would never begin."""
        done: set[str] = set()
        for start in self._same:
            # depth first, each rule once: `path` holds those that are being looked at
            path: list[str] = []
            todo = [(start, False)]
            while todo:
                name, leaving = todo.pop()
                if leaving:
                    path.pop()
                    done.add(name)
                elif name in path:
                    raise InputError("a $ref of the schema stands for itself, so that no value is described")
                elif name not in done:
                    path.append(name)
                    todo += [(name, True), *((each, False) for each in self._same.get(name, ()))]


def _target(schema: Any, reference: Any, at: str) -> Any:
    """What a reference within the schema stands for (a JSON pointer, RFC 6901)."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise InputError(f"{at}: $ref must be '#', or '#/$defs/NAME' of the same schema; got {_short(reference)}")
    found = schema
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or part not in found:
            raise InputError(f"{at}: the schema has nothing at {_short(reference)}")
        found = found[part]
    return found


def _types(given: Any, at: str) -> list[str]:
    kinds = [given] if isinstance(given, str) else _list(given, f"{at}.type")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _BY_TYPE:
            raise InputError(f"{at}: the type must be one of {', '.join(_BY_TYPE)}; got {_short(kind)}")
    return list(dict.fromkeys(kinds))


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "number": (int, float),
        "integer": (int,),
    }
    return isinstance(value, kinds.get(kind, ()))


def _bounds(asked: Mapping[str, Any], low: str, high: str, at: str) -> tuple[int, int | None]:
    least, most = asked.get(low, 0), asked.get(high)
    for name, value in ((low, least), (high, most)):
        if value is None and name == high and high not in asked:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TIMES:
            raise InputError(f"{at}.{name} must be a whole number up to {_MOST_TIMES}, got {_short(value)}")
    if most is not None and most < least:
        raise InputError(f"{at}: {high} {most} is less than {low} {least}, so that nothing is valid")
    return least, most


def _list(given: Any, at: str) -> Sequence[Any]:
    if not isinstance(given, list) or not given:
        raise InputError(f"{at} must be a list that is not empty, got {_short(given)}")
    return given


def _literal(value: Any) -> str:
    """A value's JSON as a terminal."""
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return json.dumps(text, ensure_ascii=False)


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:80]}..."
