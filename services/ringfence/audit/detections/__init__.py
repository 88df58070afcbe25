"""Detection rules over the audit trail, and their findings as events."""
