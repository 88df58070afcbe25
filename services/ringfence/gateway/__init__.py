"""The gateway: a policy enforcement point for agents. It decides every outbound request and injects the credential."""
