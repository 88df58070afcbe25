"""Git's smart HTTP protocol, as far as the gateway has to understand it. Pure.

Enters: requests to a Git server, and the advertisements with which it answers.
Leaves: the repository and service of a request (`endpoints`), the refs that a push changes (`push`), checked fetches
(`fetch`), filtered advertisements (`advertisement`); GitRequestError for what two readers could understand differently.
Imports: `messages`, `kernel.base` and `model.scope`.
Read first: `pkt_lines.py`, then `push.py`.
"""
