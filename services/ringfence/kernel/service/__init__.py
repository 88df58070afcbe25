"""The runtime of every service: process, HTTP server, logs and trust updates."""
