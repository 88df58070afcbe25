"""How policy decides: evaluation, answers, replay and explanation."""
