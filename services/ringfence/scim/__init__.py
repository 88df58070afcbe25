"""Users from their directory: a SCIM 2.0 endpoint (RFC 7643, 7644) that holds a provisioner's key."""
