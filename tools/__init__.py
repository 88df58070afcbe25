"""Programs for maintainers: generators of schemas and references, and checks of the code's structure."""
