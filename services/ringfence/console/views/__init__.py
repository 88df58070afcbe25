"""One module for each page, or group of pages: from what the services say to what the page shows.

Enters: a `View` (session, reads, query), from `console.http`.
Leaves: a `Page` (template and values).
Imports: `console.reads`, `console.commands`, `console.offers`, `console.security`; below: `client`, `model`,
`kernel`, `messages`.
Read first: page.py (`View` and `Page`), pages.py (all pages by path, and the navigation), approvals.py
(groups of equivalent requests).
"""
