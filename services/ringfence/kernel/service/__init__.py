"""The runtime of every service: process, HTTP server, logs and trust updates.

Enters: what `app.py` of a service registers at `Runtime` (tables, groups, routes, background jobs); the topic
`trust`; SIGTERM, SIGINT and SIGHUP; HTTP requests.
Leaves: `service.event` records, `/healthz`, `/readyz`, `/metrics`, JSON log lines, the exit status.
Imports: `kafka`, `crypto`, `tracing`, `http1` and `base` of the kernel, and `messages`; FastStream,
Starlette, structlog and uvicorn.
Read first:
- `runtime.py`: starts everything in order, and completes tables before it takes work.
- `process.py`: one or several services in one process, until a signal drains them.
- `trust_updates.py`: follows the trust bundle, and defers records that need the next one.
"""
