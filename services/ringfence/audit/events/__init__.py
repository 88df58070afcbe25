"""OCSF events, one module for each part of the system that they are about."""
