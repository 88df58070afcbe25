"""Revocations: verified, carried out, fenced, and confirmed by gateways."""
