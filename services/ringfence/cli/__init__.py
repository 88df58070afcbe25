"""The command line: `ringfence`. One file per command group; `main` imports each when it is asked for."""
