"""How a credential is given to a program: in its environment, by the names that programs of its kind read."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from ringfence.client.replies import IssuedCredential


def environment(credential: IssuedCredential) -> dict[str, str]:
    """Variables for one command.

    `postgres`: what libpq reads (psql, psycopg, asyncpg, JDBC wrappers and others), and `DATABASE_URL`. `redis`:
    `REDIS_URL`. Any other kind: the value as it is, in `RINGFENCE_CREDENTIAL`; of an access token that is the token.
    """
    match credential.kind:
        case "postgres":
            url = urlsplit(credential.value)
            known = {
                "PGHOST": url.hostname,
                "PGPORT": str(url.port) if url.port else None,
                "PGUSER": unquote(url.username or ""),
                "PGPASSWORD": unquote(url.password or ""),
                "PGDATABASE": unquote(url.path.removeprefix("/")),
                "PGSSLMODE": dict(parse_qsl(url.query)).get("sslmode"),
                "DATABASE_URL": credential.value,
            }
            return {name: value for name, value in known.items() if value}
        case "redis":
            return {"REDIS_URL": credential.value}
        case _:
            return {"RINGFENCE_CREDENTIAL": credential.value}
