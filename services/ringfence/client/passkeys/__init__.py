"""Signatures by passkeys: composes questions for the sign page, and takes the answers that people signed there.

No key file is involved. What comes back is verified here against exactly what was asked, and by every service again.
"""
