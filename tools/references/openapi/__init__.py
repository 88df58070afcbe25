"""The HTTP APIs of the services: the operations of each, as data for the OpenAPI documents."""
