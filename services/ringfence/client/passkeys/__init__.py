"""Signatures by passkeys: composes questions for the sign page, and takes the answers that people signed
there.

No key file is involved. Each answer is verified here against exactly what was asked, and again by every
service.

Enters: a message to sign with its evidence, from `Connection.sign`; the answer of the sign page.
Leaves: the question and its link, the signed message; NotSignedError if it is not signed.
Imports: `kernel.http1` for its server on the loopback interface; else as `client`.
Read first: `questions.py` (`compose`, `QuestionServer`, `check_answer`).
"""
