"""The audit service: maps every record to an OCSF event for the SIEM, and answers who did what for whom."""
