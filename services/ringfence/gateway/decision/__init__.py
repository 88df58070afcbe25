"""The decision core: it authenticates the sender, authorizes the action, asks the bundle and fetches the credential."""
