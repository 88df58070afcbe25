"""The embedded data plane: a forward and reverse HTTP/1.1 proxy. It asks the decision core about each request."""
