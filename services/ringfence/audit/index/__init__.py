"""The SQLite index of the audit trail, and the reports made from it."""
