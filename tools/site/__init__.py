"""How MkDocs makes the site of `docs/`: links to the rest of the repository, and diagrams as SVG."""
