"""The trial statements of `ringfence adopt`, as the agent's own program would make them: by libpq's variables.

Run by `ringfence request --exec -- python -m ringfence.cli.adopt.database_trial ALLOWED REFUSED`. Exit 0: one statement
succeeded, and the server refused the other.
"""

from __future__ import annotations

import asyncio
import sys

_WITHIN_S = 20.0


def main() -> int:
    try:
        import asyncpg
    except ImportError:
        sys.stdout.write("asyncpg is missing; install it with: pip install 'ringfence[asyncpg]'\n")
        return 1
    allowed, refused = sys.argv[1:]

    async def tried() -> int:
        connection = await asyncpg.connect(timeout=_WITHIN_S, command_timeout=_WITHIN_S)
        try:
            await connection.execute(allowed)
            sys.stdout.write(f"{allowed}: allowed\n")
            try:
                await connection.execute(refused)
            except asyncpg.InsufficientPrivilegeError:
                sys.stdout.write(f"{refused}: refused by the server\n")
                return 0
        finally:
            await connection.close()
        sys.stdout.write(f"{refused}: allowed, but must be refused\n")
        return 1

    try:
        return asyncio.run(tried())
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
