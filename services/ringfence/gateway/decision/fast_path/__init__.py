"""Cached decisions: what is checked again for each repeated request."""
