"""The SDK: agents ask for credentials, people decide and command, resource servers verify. None of the server's needs.

`from ringfence import Agent, Sponsor, Administrator, TokenVerifier` is the short way in.
"""
