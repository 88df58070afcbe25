"""Revoker: ends each lease once, at its deadline or by revocation, and retries until its credential is removed."""
