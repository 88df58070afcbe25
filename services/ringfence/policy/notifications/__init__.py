"""Webhook notices to approvers."""
