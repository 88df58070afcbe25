"""The SQLite index of the trail, and what is asked of it."""
