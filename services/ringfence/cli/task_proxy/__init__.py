"""`ringfence gateway connect`: a loopback proxy, with a password, that leads to one task's socket of the gateway."""
