"""Programs for maintainers: generators of schemas and references, and checks of names and structure."""
