"""A program that knows nothing of Ringfence: the standard library, and a URL.

python examples/unmodified-client/fetch.py URL
"""

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1]) as answer:
        print(answer.status, answer.read().decode().strip())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
