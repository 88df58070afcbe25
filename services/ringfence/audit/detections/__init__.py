"""Rules over the trail, and their findings as events."""
