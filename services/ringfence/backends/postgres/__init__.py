"""PostgreSQL roles that exist for one lease."""
