"""Revocations: verified, fenced, carried out, derived from changed records, and confirmed by gateways."""
