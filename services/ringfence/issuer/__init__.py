"""The issuer: checks each allowed decision again, mints the credential, records its lease, and answers token
introspection.
"""
