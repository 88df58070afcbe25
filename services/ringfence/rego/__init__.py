"""Evaluates the Rego bundle, for whichever service decides by it: in worker processes, or by an OPA server."""
