"""Decides every outbound action of an agent, injects the credential, blocks and reports the rest."""
