"""Loopback proxies and relays that lead to one task's socket of the gateway.

`ringfence gateway connect` has one with a password. The init of a sandbox has them without, on a loopback of its own.
"""
