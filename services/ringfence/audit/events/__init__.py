"""Builders of OCSF events, one module for each subject."""
