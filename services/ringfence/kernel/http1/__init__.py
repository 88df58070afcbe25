"""HTTP/1.1, read strictly: heads (`head`) and bodies (`body`).

The gateway and the proxies that lead to it read with the same code, so none of them sees another end of a
message.

Enters: bytes of requests and responses, from connections of the gateway, the task proxies, the runner and the
question server of passkeys.
Leaves: `RequestHead`, `ResponseHead`, `Body`; RequestRefusedError for a message that two readers could
understand differently, and its answer (`problem_answer`).
Imports: `kernel.base` (and `messages`) only.
Read first: `head.py` (the rules for heads, and the refusals), then `body.py` (where a body ends).
"""
