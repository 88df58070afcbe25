"""For agents: request a credential, receive it, use it."""
