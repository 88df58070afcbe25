"""audit: turns every step into an OCSF event for the SIEM, and answers who did what for whom."""
