"""The SDK: agents request credentials, people approve and command, resource servers verify tokens.

It needs no package that only the server needs. Import it as `from ringfence import Agent, Sponsor, Administrator,
TokenVerifier`.
"""
