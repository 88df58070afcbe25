"""Enters init in a bubblewrap sandbox: `python -I -S -B bootstrap.py FOLDER...`, with the folders to import from.

`-I` and `-S`: neither the environment nor a file of the user or of site-packages decides what is imported.
"""

import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]
    from ringfence.runner.init.main import main

    sys.exit(main())
