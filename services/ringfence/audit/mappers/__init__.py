"""Mappers: each verifies the records of some topics and maps every record to one OCSF event."""
