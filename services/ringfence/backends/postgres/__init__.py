"""Backend for PostgreSQL: a role for each lease."""
