"""Generators and measurements for those who work on Ringfence; nothing of it is installed."""
