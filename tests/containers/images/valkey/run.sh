#!/bin/sh
# The official server is built without protected mode: in a container, only the container's network reaches it.
exec /usr/local/lib/valkey-server "$@" --protected-mode no
