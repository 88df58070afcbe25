"""What every service runs on: its runtime, process, HTTP server, logs and trust updates."""
