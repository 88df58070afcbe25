"""The command line `ringfence`. Each command group has a file, which `main` imports on demand."""
