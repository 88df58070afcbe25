"""Export of the audit trail for `audit export`: formats, files and progress."""
