#!/usr/bin/python3
# Succeeds once the broker answers ApiVersions, as the official program does; its class is not among the jars.
import socket
import struct
import sys

host, _, port = sys.argv[sys.argv.index("--bootstrap-server") + 1].rpartition(":")
request = struct.pack(">hhih", 18, 0, 7, -1)  # ApiVersions, version 0, correlation id 7, no client id
with socket.create_connection((host, int(port)), timeout=10) as connection:
    connection.sendall(struct.pack(">i", len(request)) + request)
    answer = connection.recv(8)
sys.exit(answer[4:] != struct.pack(">i", 7))
