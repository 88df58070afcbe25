"""What several services must agree on: scopes and the rule, record chains, local tables."""
