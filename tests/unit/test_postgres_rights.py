"""What a scope means in PostgreSQL, without a server: never more than it says."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.backends.postgres.backend import verifier
from ringfence.backends.postgres.privileges import (
    RIGHTS,
    Level,
    Relation,
    RelationColumn,
    Right,
    grants,
    plan,
    quoted,
    rights,
)
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission
from ringfence.model.scope.globs import parse_glob

SCHEMAS = [(1, "a"), (2, "b"), (3, "a/b")]
RELATIONS = [
    Relation(10 * schema + number, name, table, table == "numbers")
    for schema, name in SCHEMAS
    for number, table in enumerate(("a", "b", "numbers", "x/y", "."))
]
COLUMNS = [
    RelationColumn(relation, number, name)
    for relation in RELATIONS
    if not relation.is_sequence
    for number, name in ((1, "a"), (2, "c"))
]


def allow(verb: str, *resources: str) -> Permission:
    return Permission(target="shop", verbs=(verb,), resources=resources)


def meant(*scope: Permission) -> list[Right]:
    return rights(plan(scope), 7, SCHEMAS, RELATIONS, COLUMNS)


def path(right: Right) -> str:
    return "/".join(["shop", *filter(None, (right.schema, right.table, right.column_name))])


SEGMENT = st.sampled_from(["a", "b", "c", "numbers", "*", "**", "x", "."])
GLOB = st.lists(SEGMENT, min_size=0, max_size=4).map(lambda names: "/".join(["shop", *names]))


@given(st.lists(st.tuples(st.sampled_from(sorted(RIGHTS)), GLOB), min_size=1, max_size=3))
def test_every_right_is_one_that_a_permission_says_or_the_way_there(wanted: list[tuple[str, str]]) -> None:
    try:
        given_rights = meant(*(allow(verb, glob) for verb, glob in wanted))
    except InexactError:
        return
    ends = [right for right in given_rights if right.level not in ("database", "schema")]
    for right in given_rights:
        says = any(
            right.right in RIGHTS[verb].get(right.level, ()) and parse_glob(glob).matches(path(right))
            for verb, glob in wanted
        )
        leads = (right.level, right.right) == ("database", "CONNECT") or (
            (right.level, right.right) == ("schema", "USAGE")
            and any(other.schema == right.schema for other in given_rights if other != right)
        )
        assert says or leads, right
    for right in ends:
        assert "/" not in right.schema + right.table + right.column_name


@given(st.sampled_from(sorted(RIGHTS)), GLOB)
def test_every_right_of_a_permission_is_granted_or_inexact(verb: str, glob: str) -> None:
    try:
        given_rights = set(meant(allow(verb, glob)))
    except InexactError:
        return
    whole = {right.oid for right in given_rights if right.level == "table"}
    for relation in RELATIONS:
        name = f"shop/{relation.schema}/{relation.name}"
        level: Level = "sequence" if relation.is_sequence else "table"
        if parse_glob(glob).matches(name) and "/" not in relation.schema + relation.name:
            for right in RIGHTS[verb].get(level, ()):
                assert (
                    Right(level, relation.oid, 0, right, relation.schema, relation.name, "") in given_rights
                )
    for column in COLUMNS:
        relation = column.relation
        name = f"shop/{relation.schema}/{relation.name}/{column.name}"
        if (
            relation.oid in whole
            or "/" in relation.schema + relation.name
            or not parse_glob(glob).matches(name)
        ):
            continue
        for right in RIGHTS[verb].get("column", ()):
            said = Right(
                "column", relation.oid, column.number, right, relation.schema, relation.name, column.name
            )
            assert said in given_rights


def test_too_much_is_refused() -> None:
    many = [Relation(100 + number, "a", f"t{number}", False) for number in range(6000)]
    with pytest.raises(InexactError, match="more than"):
        rights(plan([allow("read", "shop/a/*")]), 7, SCHEMAS, many, [])


@pytest.mark.parametrize("name", ['a"b', 'a" TO PUBLIC; --', "a\nb", "é", '"', '""'])
def test_names_are_quoted(name: str) -> None:
    assert quoted(name) == '"' + name.replace('"', '""') + '"'
    (statement,) = grants("r", "d", [Right("table", 1, 0, "SELECT", name, name, "")])
    assert statement == f'GRANT SELECT ON TABLE {quoted(name)}.{quoted(name)} TO "r"'


def test_a_verifier_is_as_rfc_7677_has_it() -> None:
    """Its example: the password `pencil`; the keys are those that PostgreSQL keeps for it."""
    assert verifier("pencil", salt=base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")) == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY="
        ":wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert verifier("pencil") != verifier("pencil")
