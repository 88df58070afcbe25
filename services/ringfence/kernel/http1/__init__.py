"""HTTP/1.1, read strictly: heads (`head`), bodies (`body`), and what answers a message that is refused (`refusal`).

The gateway and the proxies that lead to it read with the same code, so none of them sees another end of a message.
"""
