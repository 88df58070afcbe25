"""SQL queries, all constant. Values are passed as parameters; names appear only in GRANT."""

from __future__ import annotations

from typing import Final

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
