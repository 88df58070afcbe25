"""Evaluates the Rego bundle, for each service that decides by it: in worker processes, or by an OPA server.

Enters: a bundle of `.rego` files; inputs as JSON, from policy, gateway and the command line.
Leaves: `PolicyResult`, or PolicyFailedError: the caller must deny. BundleError if a bundle does not compile.
Imports: `model`, `kernel` and `messages` by the layers (it uses `kernel.base`, `messages`); not `client` and
`backends` beside it.
Read first:
- `engine.py`: `PolicyEngine`, the interface, and the strict parser of results.
- `embedded.py`: regorus in a worker process that can be killed.
- `bundle.py`: a bundle and its revision.
"""
