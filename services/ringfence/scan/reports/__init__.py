"""Forms of a report for programs and for people: JSON, SARIF, OCSF, HTML. The command line has the table."""
