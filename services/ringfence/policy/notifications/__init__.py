"""Notices to people who are asked, by webhook."""
