"""Translation of a scope into PostgreSQL privileges, and the constant SQL queries of the backend. Pure, no I/O.

A scope becomes exactly these rights on these objects, or none. A resource is `database`, `database/schema`,
`database/schema/table` or `database/schema/table/column`. Names are those of the catalogue as they are, never folded
and never cut. The database is literal, and one for a whole lease, because a credential logs in to one. Below it, a
wildcard means the objects that exist when the credential is made. Queries get values as parameters; names appear only
in GRANT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from ringfence.backends.database import PrivilegeRequest, Privileges, requests_of
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission

HERE: Final = """
    SELECT d.oid, d.datname::text AS name,
           (SELECT ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()) AS encrypted
    FROM pg_catalog.pg_database AS d, pg_catalog.pg_advisory_xact_lock($1)
    WHERE d.datname = pg_catalog.current_database()
"""
"""The current database, whether the connection is encrypted, and the lock `$1` until the transaction ends."""
SCHEMAS: Final = """
    SELECT n.oid, n.nspname::text AS name FROM pg_catalog.pg_namespace AS n
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
      AND ($1::text[] IS NULL OR n.nspname::text = ANY($1))
"""
"""Schemas, limited to these names if any are given."""
RELATIONS: Final = """
    SELECT c.oid, n.nspname::text AS schema, c.relname::text AS name, c.relkind = 'S' AS sequence
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND c.relkind = ANY('{r,p,v,m,f,S}')
      AND ($1::text[] IS NULL OR n.nspname::text = ANY($1)) AND ($2::text[] IS NULL OR c.relname::text = ANY($2))
"""
"""Tables, what is used like them, and sequences, limited to these schemas and names if any are given."""
COLUMNS: Final = """
    SELECT a.attrelid AS relation, a.attnum AS number, a.attname::text AS name FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped
"""
LACKING: Final = """
    SELECT number
    FROM unnest($2::text[], $3::oid[], $4::int2[], $5::text[]) WITH ORDINALITY AS w (level, oid, col, what, number)
    WHERE NOT CASE level
        WHEN 'database' THEN has_database_privilege($1::name, oid, what)
        WHEN 'schema' THEN has_schema_privilege($1::name, oid, what)
        WHEN 'sequence' THEN has_sequence_privilege($1::name, oid, what)
        WHEN 'column' THEN has_column_privilege($1::name, oid, col, what)
        ELSE has_table_privilege($1::name, oid, what) END
    LIMIT 1
"""
"""The first of these rights, counted from 1, that the role `$1` does not have."""
BEYOND: Final = """
    WITH asked AS (SELECT * FROM unnest($1::text[], $2::oid[], $3::int2[], $4::text[]) AS w (level, oid, col, what)),
    own AS (SELECT n.* FROM pg_catalog.pg_namespace AS n
            WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'),
    seen AS (SELECT n.* FROM own AS n WHERE has_schema_privilege('public', n.oid, 'USAGE')
             OR EXISTS (SELECT FROM asked AS w WHERE w.level = 'schema' AND w.oid = n.oid))
    SELECT 'connect to' AS may, d.datname::text AS what FROM pg_catalog.pg_database AS d
    WHERE d.datallowconn AND d.datname <> current_database() AND has_database_privilege('public', d.oid, 'CONNECT')
    UNION ALL
    SELECT 'make temporary tables in', d.datname FROM pg_catalog.pg_database AS d
    WHERE d.datname = current_database() AND has_database_privilege('public', d.oid, 'TEMPORARY')
      AND NOT EXISTS (SELECT FROM asked AS w WHERE w.level = 'database' AND w.what = 'TEMPORARY')
    UNION ALL
    SELECT 'create in schema', n.nspname FROM own AS n
    WHERE has_schema_privilege('public', n.oid, 'CREATE')
      AND NOT EXISTS (SELECT FROM asked AS w WHERE w.level = 'schema' AND w.oid = n.oid AND w.what = 'CREATE')
    UNION ALL
    SELECT lower(a.privilege_type), n.nspname || '/' || c.relname
    FROM pg_catalog.pg_class AS c JOIN seen AS n ON n.oid = c.relnamespace, aclexplode(c.relacl) AS a
    WHERE c.relacl IS NOT NULL AND CASE WHEN c.relkind = 'S'
            THEN has_sequence_privilege('public', c.oid, 'SELECT, USAGE, UPDATE')
            ELSE has_table_privilege('public', c.oid,
                                     'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER') END
      AND a.grantee = 0 AND NOT EXISTS (
        SELECT FROM asked AS w WHERE w.level IN ('table', 'sequence') AND w.oid = c.oid AND w.what = a.privilege_type)
    UNION ALL
    SELECT lower(a.privilege_type), n.nspname || '/' || c.relname || '/' || t.attname
    FROM pg_catalog.pg_attribute AS t JOIN pg_catalog.pg_class AS c ON c.oid = t.attrelid
         JOIN seen AS n ON n.oid = c.relnamespace, aclexplode(t.attacl) AS a
    WHERE t.attacl IS NOT NULL AND NOT t.attisdropped
      AND has_column_privilege('public', c.oid, t.attnum, 'SELECT, INSERT, UPDATE, REFERENCES')
      AND a.grantee = 0 AND NOT EXISTS (
        SELECT FROM asked AS w WHERE w.oid = c.oid AND w.what = a.privilege_type
          AND (w.level = 'table' OR (w.level = 'column' AND w.col = t.attnum)))
    UNION ALL
    SELECT 'execute, with the rights of another,', n.nspname || '/' || p.proname
    FROM pg_catalog.pg_proc AS p JOIN seen AS n ON n.oid = p.pronamespace
    WHERE p.prosecdef AND has_function_privilege('public', p.oid, 'EXECUTE')
    LIMIT 1
"""
"""One privilege of PUBLIC that is not in the list.

What PUBLIC has everywhere by default is left out: functions that run with the rights of their caller, types, languages,
and a user's own large objects.
"""
ROLES: Final = """
    SELECT r.oid, r.rolname::text AS name, coalesce((
        SELECT array_agg(DISTINCT d.datname::text) FROM pg_catalog.pg_shdepend AS s
        JOIN pg_catalog.pg_database AS d
          ON d.oid = s.dbid OR (s.dbid = 0 AND s.classid = 'pg_catalog.pg_database'::regclass AND d.oid = s.objid)
        WHERE s.refclassid = 'pg_catalog.pg_authid'::regclass AND s.refobjid = r.oid), '{}') AS databases
    FROM pg_catalog.pg_roles AS r WHERE starts_with(r.rolname::text, $1)
"""
"""Roles with the name prefix `$1`, and the databases in which they own something or have rights."""
TERMINATE: Final = """
    SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity AS a WHERE a.usesysid = $1
"""
"""Ends the sessions of the role with the OID `$1`. Returns no rows if none is left."""


Level = Literal["database", "schema", "table", "sequence", "column"]

_READ_WRITE: Final[dict[str, dict[Level, tuple[str, ...]]]] = {
    "read": {
        "database": ("CONNECT",),
        "schema": ("USAGE",),
        "table": ("SELECT",),
        "sequence": ("SELECT",),
        "column": ("SELECT",),
    },
    "write": {
        "table": ("INSERT", "UPDATE", "DELETE"),
        "sequence": ("USAGE", "UPDATE"),
        "column": ("INSERT", "UPDATE"),
    },
}
RIGHTS: Final[dict[str, dict[Level, tuple[str, ...]]]] = {
    **_READ_WRITE,
    "select": {"table": ("SELECT",), "column": ("SELECT",)},
    "insert": {"table": ("INSERT",), "column": ("INSERT",)},
    "update": {"table": ("UPDATE",), "column": ("UPDATE",)},
    "delete": {"table": ("DELETE",)},
    "truncate": {"table": ("TRUNCATE",)},
    "usage": {"sequence": ("USAGE",)},
    "create": {"schema": ("CREATE",)},
    "temporary": {"database": ("TEMPORARY",)},
}
"""The target's privileges by verb and kind of object. Privileges that a newer server adds belong to no verb."""

MAX_NAME_BYTES: Final = 63
"""PostgreSQL truncates longer names, and the name would then mean another object."""
MAX_RIGHTS: Final = 5000
_DEPTH: Final[dict[Level, int]] = {"database": 1, "schema": 2, "table": 3, "sequence": 3, "column": 4}
_KNOWN: Final = Privileges(
    RIGHTS, _DEPTH, MAX_NAME_BYTES, lambda name: len(name.encode()), "bytes", "database/schema/table"
)


class Relation(NamedTuple):
    """A table, or something used like one, or a sequence, as the catalogue has it."""

    oid: int
    schema: str
    name: str
    is_sequence: bool


class RelationColumn(NamedTuple):
    relation: Relation
    number: int
    name: str


class Right(NamedTuple):
    """One privilege on one object. The server is asked by `oid` and `column`; GRANT uses the names."""

    level: Level
    oid: int
    column: int
    right: str
    schema: str
    table: str
    column_name: str


@dataclass(frozen=True, slots=True)
class PrivilegePlan:
    """A parsed scope: one database, and the requested privileges in it."""

    database: str
    requests: tuple[PrivilegeRequest, ...]

    @property
    def schemas(self) -> list[str] | None:
        """Return the names of the schemas that can match, or None if the pattern has a wildcard there."""
        return self._literal(1)

    @property
    def relations(self) -> list[str] | None:
        """Return the names of the tables and sequences that can match, or None if the pattern has a wildcard there."""
        return self._literal(2)

    def _literal(self, at: int) -> list[str] | None:
        names = set()
        for request in self.requests:
            segments = request.glob.segments
            if any("*" in segment for segment in segments[: at + 1]):
                return None
            if len(segments) > at:
                names.add(segments[at])
        return sorted(names)


def plan(scope: Iterable[Permission]) -> PrivilegePlan:
    """Parse a scope without access to a server. Raises InexactError."""
    requests = requests_of(scope, _KNOWN)
    databases = {request.glob.segments[0] for request in requests}
    if len(databases) > 1:
        raise InexactError("a credential is for one database: ask for one for each")
    return PrivilegePlan(databases.pop(), requests)


def rights(
    wanted: PrivilegePlan,
    database_oid: int,
    schemas: Sequence[tuple[int, str]],
    relations: Sequence[Relation],
    columns: Sequence[RelationColumn],
) -> list[Right]:
    """Return all privileges that a plan means, with those needed to reach the objects: CONNECT, and USAGE of the
    schemas.

    Raises InexactError if a request matches nothing that exists, or more than `MAX_RIGHTS`.
    """
    database = wanted.database
    oids = {name: oid for oid, name in schemas}
    resolved: dict[Right, None] = {}

    def add(right: Right) -> None:
        resolved[Right("database", database_oid, 0, "CONNECT", "", "", "")] = None
        if right.schema:
            resolved[Right("schema", oids[right.schema], 0, "USAGE", right.schema, "", "")] = None
        resolved[right] = None
        if len(resolved) > MAX_RIGHTS:
            raise InexactError(f"the scope means more than {MAX_RIGHTS} rights: ask for less at a time")

    for request in wanted.requests:
        matching = list(_rights_of(request, database, database_oid, schemas, relations, columns))
        if not matching:
            raise InexactError(f"{request} means nothing that is in database {database!a} now")
        for right in matching:
            add(right)
    return list(resolved)


def _rights_of(
    request: PrivilegeRequest,
    database: str,
    database_oid: int,
    schemas: Sequence[tuple[int, str]],
    relations: Sequence[Relation],
    columns: Sequence[RelationColumn],
) -> Iterator[Right]:
    if request.covers(database):
        for right in request.rights("database"):
            yield Right("database", database_oid, 0, right, "", "", "")
    for oid, schema in schemas if request.rights("schema") else ():
        if request.covers(database, schema):
            for right in request.rights("schema"):
                yield Right("schema", oid, 0, right, schema, "", "")
    whole: set[int] = set()
    for one in relations:
        level: Level = "sequence" if one.is_sequence else "table"
        if request.rights(level) and request.covers(database, one.schema, one.name):
            whole.add(one.oid)
            for right in request.rights(level):
                yield Right(level, one.oid, 0, right, one.schema, one.name, "")
    for column in columns if request.wants_columns else ():
        relation = column.relation
        if relation.oid not in whole and request.covers(
            database, relation.schema, relation.name, column.name
        ):
            for right in request.rights("column"):
                yield Right(
                    "column", relation.oid, column.number, right, relation.schema, relation.name, column.name
                )


def quoted(name: str) -> str:
    """Return a name as a quoted SQL identifier, whatever it contains."""
    return '"' + name.replace('"', '""') + '"'


def grants(role: str, database: str, wanted: Iterable[Right]) -> Iterator[str]:
    by_object: dict[tuple[str, str], list[str]] = {}
    for right in wanted:
        match right.level:
            case "database":
                object_name = quoted(database)
            case "schema":
                object_name = quoted(right.schema)
            case _:
                object_name = f"{quoted(right.schema)}.{quoted(right.table)}"
        kind = "TABLE" if right.level == "column" else right.level.upper()
        privilege = f"{right.right} ({quoted(right.column_name)})" if right.level == "column" else right.right
        by_object.setdefault((kind, object_name), []).append(privilege)
    by_right: dict[tuple[str, str], list[str]] = {}
    for (kind, object_name), whats in by_object.items():
        by_right.setdefault((kind, ", ".join(whats)), []).append(object_name)
    for (kind, whats_text), wheres in by_right.items():
        yield f"GRANT {whats_text} ON {kind} {', '.join(wheres)} TO {quoted(role)}"
